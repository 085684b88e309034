"""What the decode role keeps of a sequence before and while it is resident."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from baton.messages import Ended, Freed, Preempted, PrefillReport
from baton.spec import HandoffKey, SequenceSpec, TokenLogprobs
from baton.worker.session import RouterSession
from decode_worker.scheduler import Expected
from kvtransfer.blocks.admission import Need, Room


@dataclass(frozen=True, slots=True)
class FirstToken:
    """A commit's payload. `drawn_at` is in this worker's monotonic seconds."""

    token: int
    logprobs: TokenLogprobs | None
    drawn_at: float


@dataclass(frozen=True, slots=True)
class Pending:
    """A granted sequence until it is resident. `writer` is the sender's incarnation; `arrived_at` is when its request
    arrived at the router, in monotonic seconds; `missed` is what this process had missed when it granted; `waited` is
    whether there was no room at first."""

    spec: SequenceSpec
    need: Need
    router: RouterSession
    transport: str
    writer: str
    arrived_at: float
    missed: float
    waited: bool = False

    @property
    def expected(self) -> Expected | None:
        """None for a sequence without an objective that its arrival could miss."""
        gaps = self.spec.max_tokens - len(self.spec.output) - 1
        tpot_ms = self.spec.objectives.tpot_ms
        return None if tpot_ms is None or gaps < 1 else Expected(gaps, tpot_ms / 1e3)


@dataclass(slots=True)
class PromptHere:
    """A prompt that is computed on this worker; times are monotonic seconds unless in milliseconds."""

    room: Room
    digests: list[bytes]
    started_at: float
    queue_ms: float
    first_token_at: float | None = None

    def report(self, attempt: bytes) -> PrefillReport:
        done = self.started_at if self.first_token_at is None else self.first_token_at
        return PrefillReport(attempt, self.queue_ms, (done - self.started_at) * 1e3, self.room.cached_tokens)


class ResidentState(enum.Enum):
    RUNNING = enum.auto()
    STOPPING = enum.auto()
    RELEASED = enum.auto()


@dataclass(slots=True)
class Resident:
    """A sequence in the engine; the ledger owns its blocks. `tokens` mirrors the engine's; the first `computed` of them
    have their KV, trusted only if `sound`. Times are monotonic seconds; `arrived_at` is when its request arrived at the
    router. `prompt` and `rank` count only where the prompt is computed here. The router gets `farewell` when a STOPPING
    sequence is out of the engine."""

    key: HandoffKey
    spec: SequenceSpec
    need: Need
    router: RouterSession
    tokens: list[int]
    arrived_at: float
    resident_at: float
    computed: int
    state: ResidentState = ResidentState.RUNNING
    first_step_at: float | None = None
    farewell: Freed | Ended | Preempted | None = None
    prompt: PromptHere | None = None
    rank: float = 0.0
    sound: bool = True

    @property
    def uncomputed(self) -> int:
        """Prompt tokens. Steps that a cancel overtook may have gone beyond the tokens that are known here."""
        waits = self.prompt is not None and self.prompt.first_token_at is None
        return max(0, len(self.tokens) - self.computed) if waits else 0
