"""The part of a step that every engine shares: check the work, sample, advance the sequences."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import structlog
import torch

from baton.engine.api import Sampled, Sequence, Work
from baton.engine.files.card import ModelDescription
from baton.engine.kv import KvPool
from baton.engine.sampling import Logits, Penalties, logprobs, sample
from baton.model import KvLayout
from baton.spec import Sampling

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class SequenceState:
    """An engine's state of a sequence between steps, in `Sequence.engine_state`. `table` is `Sequence.blocks` as an
    int64 tensor on the CPU; `penalties` are None where sampling needs none."""

    table: torch.Tensor
    penalties: Penalties | None


def state_of(sequence: Sequence) -> SequenceState:
    """The state, made at a sequence's first step, with a block table that has all blocks appended since."""
    state = sequence.engine_state
    if not isinstance(state, SequenceState):
        state = SequenceState(torch.tensor(sequence.blocks, dtype=torch.int64), Penalties.for_sampling(sequence))
        sequence.engine_state = state
    elif len(state.table) != len(sequence.blocks):
        state.table = torch.tensor(sequence.blocks, dtype=torch.int64)
    return state


class Stepper(ABC):
    """`baton.engine.api.Engine` over a `_forward` that computes logits. Every token id is below the vocabulary's size.
    `kernels` names the implementation, for logs; `weight_bytes` is the memory of the weights."""

    def __init__(self, description: ModelDescription, pool: KvPool, kernels: str, weight_bytes: int) -> None:
        self.description, self.pool, self.kernels, self.weight_bytes = description, pool, kernels, weight_bytes

    @property
    def layout(self) -> KvLayout:
        return self.pool.layout

    def step(self, batch: list[Work]) -> list[Sampled | None]:
        sampled, logits = self._run(batch)
        results: list[Sampled | None] = [None] * len(batch)
        for row, index in enumerate(sampled):
            results[index] = _drawn(batch[index].sequence, logits[row])
        return results

    def logits(self, batch: list[Work]) -> dict[int, Logits]:
        """A step without sampling: the logits [vocabulary] by the index of each work item that would sample."""
        sampled, logits = self._run(batch)
        return {index: logits[row].copy() for row, index in enumerate(sampled)}

    def warm_up(self) -> None:
        """Runs one prefill and one decode step on block 0, before any sequence holds it."""
        tokens = min(self.layout.block_tokens, self.description.config.context_tokens)
        sequence = Sequence(bytes(16), [0] * (tokens - 1), tokens - 1, [0], 0, Sampling(temperature=0.0))
        self.step([Work(sequence, tokens - 1)])
        sequence.tokens.append(0)
        self.step([Work(sequence, 1)])

    @abstractmethod
    def wake(self, blocks: Seq[int]) -> None: ...

    @abstractmethod
    def _forward(self, batch: list[Work]) -> tuple[tuple[int, ...], Logits]:
        """Writes the batch's KV. Returns the indices of the work items that sample and a row of logits for each, valid
        until the next call."""

    def _run(self, batch: list[Work]) -> tuple[tuple[int, ...], Logits]:
        assert batch, "a step computes something"
        for work in batch:
            sequence = work.sequence
            assert 1 <= work.count <= sequence.remaining, "a step computes known tokens"
            covered = len(sequence.blocks) * self.layout.block_tokens
            assert sequence.computed + work.count <= covered, "blocks cover what is computed"
        found = self._forward(batch)
        for work in batch:
            work.sequence.computed += work.count
        return found


def _drawn(sequence: Sequence, logits: Logits) -> Sampled:
    """Draws from logits that are finite. Whatever is wrong ends this sequence alone."""
    position = len(sequence.tokens)
    if not np.isfinite(logits).all():  # 6 us for 49,152 logits
        return Sampled((), error=f"logits are not finite at position {position}")
    try:
        return _sampled(sequence, logits)
    except Exception as error:  # a boundary: this sequence fails, the others of the step go on
        log.error("a token could not be drawn", position=position, exc_info=error)
        return Sampled((), error=f"no token could be drawn at position {position}: {type(error).__name__}: {error}")


def _sampled(sequence: Sequence, logits: Logits) -> Sampled:
    sampling, penalties = sequence.sampling, state_of(sequence).penalties
    if penalties is not None:
        penalties.observe(sequence.tokens, len(logits))
    token = sample(logits, sampling, len(sequence.tokens), penalties)
    if sampling.logprobs is None:
        return Sampled((token,))
    return Sampled((token,), (logprobs(logits, token, sampling.logprobs),))
