"""A request in simulated time."""

from __future__ import annotations

import math
from dataclasses import dataclass

from baton.bench.schedule.plan import Planned
from baton.engine import api
from baton.spec import AttemptKey, SequenceSpec
from router.placement.snapshot import Demand
from router.requests.attempt import Attempt


@dataclass(slots=True)
class Served:
    """A request and its course, in seconds from the start. Implements `prompt_queue.Waiting`."""

    planned: Planned
    spec: SequenceSpec
    demand: Demand
    attempt: Attempt | None = None
    received_at: float = 0.0
    rank: float = 0.0
    work_s: float = 0.0
    late: bool = False
    sequence: api.Sequence | None = None
    first_at: float | None = None
    last_at: float = 0.0
    tokens: int = 0

    @property
    def key(self) -> AttemptKey:
        return self.spec.attempt

    @property
    def uncomputed(self) -> int:
        """Prompt tokens still to compute."""
        return self.sequence.remaining if self.sequence is not None and not self.sequence.output_tokens else 0

    @property
    def ttft_s(self) -> float:
        return (math.inf if self.first_at is None else self.first_at) - self.planned.at_s

    @property
    def tpot_s(self) -> float:
        return (self.last_at - (self.first_at or 0.0)) / (self.tokens - 1) if self.tokens > 1 else 0.0

    @property
    def kept(self) -> bool:
        """Whether it kept both objectives; an absent one counts as kept."""
        asked = self.planned.traffic
        within = [(asked.ttft_ms, self.ttft_s), (asked.tpot_ms, self.tpot_s)]
        return all(limit is None or seconds * 1e3 <= limit for limit, seconds in within)
