"""What every engine does around its arithmetic: check the work, sample, advance the sequences."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence as Seq

from baton.engine.api import Sampled, Sequence, Work
from baton.engine.files.card import ModelDescription
from baton.engine.kv import KvPool
from baton.engine.sampling.sampler import Logits, logprobs, sample
from baton.engine.state import state_of
from baton.spec import Sampling, TokenLogprobs
from kvtransfer.blocks.layout import KvLayout


class Stepper(ABC):
    """`baton.engine.api.Engine` over a `_forward` that computes logits. Used from one thread."""

    def __init__(self, description: ModelDescription, pool: KvPool) -> None:
        self.description = description
        self._pool = pool

    @property
    def layout(self) -> KvLayout:
        return self._pool.layout

    @property
    def pool(self) -> KvPool:
        """The blocks it computes on."""
        return self._pool

    def step(self, batch: list[Work]) -> list[Sampled | None]:
        """See `api.Engine.step`. Every token id must be below the vocabulary's size."""
        sampled, logits = self._run(batch)
        results: list[Sampled | None] = [None] * len(batch)
        for row, index in enumerate(sampled):
            results[index] = _sampled(batch[index].sequence, logits[row])
        return results

    def logits(self, batch: list[Work]) -> dict[int, Logits]:
        """A step that draws nothing: per index of a work item that would sample, its logits [vocabulary]."""
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
    def wake(self, blocks: Seq[int]) -> None:
        """See `api.Engine.wake`."""

    @abstractmethod
    def _forward(self, batch: list[Work]) -> tuple[tuple[int, ...], Logits]:
        """Writes the KV of the batch and returns the indices of the work items that sample with their logits' rows.

        The logits stay valid until the next call.
        """

    def _run(self, batch: list[Work]) -> tuple[tuple[int, ...], Logits]:
        assert batch, "a step computes something"
        for work in batch:
            _check(work, self.layout)
        found = self._forward(batch)
        for work in batch:
            work.sequence.computed += work.count
        return found


def _check(work: Work, layout: KvLayout) -> None:
    sequence = work.sequence
    assert 1 <= work.count <= sequence.remaining, "a step computes known tokens"
    covered = len(sequence.blocks) * layout.block_tokens
    assert sequence.computed + work.count <= covered, "blocks cover what is computed"


def _sampled(sequence: Sequence, logits: Logits) -> Sampled:
    sampling, penalties = sequence.sampling, state_of(sequence).penalties
    if penalties is not None:
        penalties.observe(sequence.tokens, len(logits))
    token = sample(logits, sampling, len(sequence.tokens), penalties)
    reported: tuple[TokenLogprobs, ...] = ()
    if sampling.logprobs is not None:
        reported = (logprobs(logits, token, sampling.logprobs),)
    return Sampled((token,), reported)
