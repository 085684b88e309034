"""The interface between schedulers and engines.

One step serves both phases: for each sequence it computes the KV of `count` tokens from position `computed`, and
samples when that reaches the last known token. `count` is a chunk in prefill and 1 in decode. The scheduler chooses a
step's sequences; the engine only computes.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Protocol

from baton.cost import StepShape, pairs
from baton.model import KvLayout
from baton.spec import NEVER_STOP, AttemptKey, Sampling, SequenceSpec, StopRule, TokenLogprobs


@dataclass(slots=True)
class Sequence:
    """A sequence on this worker. Owned by the engine thread between `Runner.submit(add)` and its removal.

    `tokens` is prompt followed by output; `tokens[:computed]` have their KV in `blocks`. Prompts of smaller `rank` go
    first; a `late` one is computed in short steps, between which others overtake it. `tpot_s` is the objective for the
    mean of its steps from `first_token_at` on (monotonic seconds; None: from when a scheduler sees it). `engine_state`
    belongs to the engine alone (a block table tensor, penalty counts).
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
        """`blocks` cover at least the positions to compute here, in order of position."""
        tokens = [*spec.prompt, *spec.output]
        tpot = None if spec.objectives.tpot_ms is None else spec.objectives.tpot_ms / 1e3
        return cls(
            spec.attempt, tokens, len(spec.prompt), blocks, computed, spec.sampling, StopRule.of(spec), rank, late, tpot
        )

    @property
    def output_tokens(self) -> int:
        """Tokens generated so far, with those of earlier attempts."""
        return len(self.tokens) - self.prompt_tokens

    @property
    def remaining(self) -> int:
        """Known tokens whose KV is not computed yet."""
        return len(self.tokens) - self.computed


@dataclass(frozen=True, slots=True)
class Work:
    """Compute `count` tokens of `sequence` from its `computed` on; sample if these are all of its known tokens."""

    sequence: Sequence
    count: int

    @property
    def samples(self) -> bool:
        return self.count == self.sequence.remaining


@dataclass(frozen=True, slots=True)
class Sampled:
    """The tokens that a step drew for one sequence: one, or several when speculating; none where `error` says why
    nothing could be drawn. Then the sequence can't go on, and its KV is not to be trusted."""

    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    error: str = ""


class Engine(Protocol):
    """Computes steps over one block pool. Used from one thread; never blocks on anything but arithmetic."""

    @property
    def layout(self) -> KvLayout: ...

    def step(self, batch: list[Work]) -> list[Sampled | None]:
        """Computes one mixed batch, not empty, and returns each work item's sample (None if `samples` is False).

        What is wrong with one sequence alone is the `error` of its sample; what raises is wrong with the whole step.
        Writes KV for positions `[computed, computed + count)` into the sequence's blocks and then advances
        `computed`; appends nothing to `tokens` (the scheduler does).
        """

    def warm_up(self) -> None:
        """Runs everything that is slow once (lazy allocations, kernel selection), so that the first request is not."""

    def wake(self, blocks: Seq[int]) -> None:
        """Reads, after a rest, the memory that a step over these blocks needs. A peer may be writing the blocks."""


def shape_of(batch: list[Work]) -> StepShape:
    """The shape of a step before it runs. A work item of one token counts as decoding."""
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
