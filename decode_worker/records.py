"""What the decode role keeps of a sequence before and after it is resident."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from baton.spec import AttemptKey, HandoffKey, SequenceSpec, TokenLogprobs
from baton.v1 import worker_pb2 as wire
from baton.worker.service import RouterSession
from decode_worker.scheduler import Expected
from kvtransfer.blocks.admission import Room
from kvtransfer.handoffs.messages import Aborted


@dataclass(frozen=True, slots=True)
class FirstToken:
    """What a commit carries: the token that the prefill worker drew, and when, in this worker's monotonic seconds."""

    token: int
    logprobs: TokenLogprobs | None
    drawn_at: float


@dataclass(frozen=True, slots=True)
class Pending:
    """A granted sequence until it is resident."""

    spec: SequenceSpec
    router: RouterSession
    transport: str
    writer: str

    @property
    def expected(self) -> Expected | None:
        """What the scheduler has to know of it; None where nothing hangs on when it comes."""
        gaps = self.spec.max_tokens - len(self.spec.output) - 1
        tpot_ms = self.spec.objectives.tpot_ms
        return None if tpot_ms is None or gaps < 1 else Expected(gaps, tpot_ms / 1e3)


@dataclass(slots=True)
class PromptHere:
    """Of a sequence whose prompt is computed on this worker: its own blocks, and what it took. Monotonic seconds."""

    room: Room
    digests: list[bytes]
    started_at: float
    queue_ms: float
    first_token_at: float | None = None

    def report(self, attempt: AttemptKey) -> wire.PrefillReport:
        """What computing it cost."""
        done = self.started_at if self.first_token_at is None else self.first_token_at
        return wire.PrefillReport(
            attempt=attempt,
            queue_ms=self.queue_ms,
            prefill_ms=(done - self.started_at) * 1e3,
            cached_tokens=self.room.cached_tokens,
        )


@dataclass(slots=True)
class Resident:
    """A sequence that decodes here. `tokens` mirrors the engine's and `computed` is how many of them have their KV;
    times are monotonic. `prompt` is set where the prompt is computed here, `rank` orders such."""

    key: HandoffKey
    spec: SequenceSpec
    router: RouterSession
    tokens: list[int]
    resident_at: float
    computed: int
    first_step_at: float | None = None
    ending: bool = field(default=False)
    failure: str = ""
    """Why it ends, where its own results could not be handled."""
    prompt: PromptHere | None = None
    rank: float = 0.0

    @property
    def uncomputed(self) -> int:
        """Prompt tokens still to compute here."""
        waits = self.prompt is not None and self.prompt.first_token_at is None
        return len(self.tokens) - self.computed if waits else 0


class Writers(Protocol):
    """The control streams of the workers that hand over to this one, by incarnation."""

    def committed(self, writer: str, key: HandoffKey) -> None:
        """Tells the writer that the sequence is resident."""

    def aborted(self, writer: str, aborted: Aborted) -> None:
        """Tells the writer to stop writing and to answer with a close."""
