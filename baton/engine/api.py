"""The engine's seam: what schedulers ask of it, and what comes back.

One step serves both phases: for each sequence, "compute the KV of `count` tokens from position `start`", and sample
when that reaches the end of what is known. `count` is a chunk in prefill and 1 in decode. A scheduler decides who is
in a step; the engine only computes.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Protocol

from baton.cost import StepShape, pairs
from baton.spec import NEVER_STOP, AttemptKey, Sampling, SequenceSpec, StopRule, TokenLogprobs
from kvtransfer.blocks.layout import KvLayout


@dataclass(slots=True)
class Sequence:
    """A sequence on this worker. Owned by the engine thread between `Runner.submit(add)` and its removal.

    `tokens` is prompt followed by output; `tokens[:computed]` have their KV in `blocks`. `rank` orders prompts, the
    smallest first, and a `late` one makes way for others between short steps; `tpot_s` is the objective for the
    mean of its steps, which count from `first_token_at` (monotonic seconds; None: from when a scheduler sees it).
    `engine_state` is the engine's own (a block table tensor,
    penalty counts), and nobody else's.
    """

    key: AttemptKey
    tokens: list[int]
    prompt_tokens: int
    blocks: list[int]
    computed: int
    sampling: Sampling
    rule: StopRule = NEVER_STOP
    rank: float = 0.0
    late: bool = False
    tpot_s: float | None = None
    first_token_at: float | None = None
    engine_state: object = field(default=None, repr=False)

    @classmethod
    def from_spec(
        cls, spec: SequenceSpec, blocks: list[int], computed: int = 0, rank: float = 0.0, late: bool = False
    ) -> Sequence:
        """`blocks` cover at least the positions that will be computed here, in order of position."""
        tokens = [*spec.prompt, *spec.output]
        tpot = None if spec.objectives.tpot_ms is None else spec.objectives.tpot_ms / 1e3
        return cls(
            spec.attempt, tokens, len(spec.prompt), blocks, computed, spec.sampling, StopRule.of(spec), rank, late, tpot
        )

    @property
    def output_tokens(self) -> int:
        """Tokens generated so far, those of earlier attempts included."""
        return len(self.tokens) - self.prompt_tokens

    @property
    def remaining(self) -> int:
        """Known tokens whose KV is not computed yet."""
        return len(self.tokens) - self.computed


@dataclass(frozen=True, slots=True)
class Work:
    """Compute `count` tokens of `sequence` from its `computed` on; sample if that is all of its known tokens."""

    sequence: Sequence
    count: int

    @property
    def samples(self) -> bool:
        return self.count == self.sequence.remaining


@dataclass(frozen=True, slots=True)
class Sampled:
    """Tokens that a step drew for one sequence: one, or several when speculating."""

    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()


class Engine(Protocol):
    """Computes steps over one block pool. Used from one thread; never blocks on anything but arithmetic."""

    @property
    def layout(self) -> KvLayout:
        """The shape of the blocks it reads and writes."""

    def step(self, batch: list[Work]) -> list[Sampled | None]:
        """Computes one mixed batch and returns, per work item, what was sampled (None where `samples` is False).

        Writes KV for positions `[computed, computed + count)` into the sequence's blocks and then advances
        `computed`; appends nothing to `tokens` (the scheduler does). The batch must not be empty.
        """

    def warm_up(self) -> None:
        """Runs what is slow only once (lazy allocations, kernel selection), so that the first request is not."""

    def wake(self, blocks: Seq[int]) -> None:
        """Touches what a step over these blocks will read, after a rest. Reads only: a peer may be writing them."""


def shape_of(batch: list[Work]) -> StepShape:
    """What a step will compute, before it does: one token of a sequence counts as decoding."""
    new = resident = sequences = 0
    attended = 0.0
    for work in batch:
        if work.count == 1:
            sequences += 1
            resident += work.sequence.computed + 1
        else:
            new += work.count
            attended += pairs(work.count, work.sequence.computed)
    return StepShape(new, attended, sequences, resident)
