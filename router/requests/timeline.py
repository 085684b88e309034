"""A request's times. Each duration comes from one monotonic clock: the router's own, or a worker's."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from baton.messages import Ended, PrefillReport
from baton.spec import FinishReason, Objectives


class Path(Enum):
    """The values are the wire's."""

    DISAGGREGATED = 1
    PREFILL_ONLY = 2
    DIRECT = 3


@dataclass(slots=True)
class Marks:
    """Moments and measurements gathered while a request runs; seconds on the router's clock."""

    arrived: float
    commanded: float | None = None
    first_token: float | None = None
    last_token: float | None = None
    queue_ms: float = 0.0
    cached_tokens: int = 0

    def token(self, now: float) -> None:
        """Tokens went into the stream."""
        if self.first_token is None:
            self.first_token = now
        self.last_token = now

    @property
    def ttft_ms(self) -> float:
        """Arrival to the first token; 0 without one."""
        return 0.0 if self.first_token is None else (self.first_token - self.arrived) * 1e3

    def tpot_ms(self, tokens: int) -> float | None:
        """Mean over the tokens after the first."""
        if self.first_token is None or self.last_token is None or tokens < 2:
            return None
        return (self.last_token - self.first_token) * 1e3 / (tokens - 1)


@dataclass(frozen=True, slots=True)
class FormerAttempt:
    """An attempt that did not come to the end. It was left `ended_ms` after the request's arrival, when the client had
    `tokens` of the output."""

    prefill_worker: str
    decode_worker: str
    handoffs: int
    tokens: int
    ended_ms: float
    why: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """The good end of a request, for its client. The workers' reports are None where they did not come."""

    reason: FinishReason
    stop: str
    prompt_tokens: int
    output_tokens: int
    marks: Marks
    prefill: PrefillReport | None
    ended: Ended | None
    total_ms: float
    attempts: int
    handoffs: int
    prefill_worker: str
    decode_worker: str
    path: Path
    objectives: Objectives
    simulated: bool = False
    """No model computed it."""
    former: tuple[FormerAttempt, ...] = ()
    """The attempts before the last one."""
    preemptions: int = 0

    @property
    def ttft_kept(self) -> bool | None:
        """None where no such objective was set."""
        limit = self.objectives.ttft_ms
        return None if limit is None else self.marks.ttft_ms <= limit

    @property
    def tpot_kept(self) -> bool | None:
        """None where no such objective was set, or where it does not apply."""
        limit, measured = self.objectives.tpot_ms, self.marks.tpot_ms(self.output_tokens)
        return None if limit is None or measured is None else measured <= limit
