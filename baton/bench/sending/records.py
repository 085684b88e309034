"""The course of one request, by the client's clock.

    planned -> sent -> accepted -> first token -> ... -> ended        status OK, or a gRPC status name

Times are seconds after the start of the run. Latencies count from when the request was due, not from when it went out.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

from baton.bench.schedule.plan import Planned
from baton.client.types import Accepted, Finished

OK, REFUSED, INCOMPLETE = "OK", "RESOURCE_EXHAUSTED", "INCOMPLETE"
"""INCOMPLETE: the stream ended without an error and without a result."""


@dataclass(slots=True)
class Record:
    """Filled in by the driver. `stamps` and `counts` have an entry per event with tokens."""

    planned: Planned
    sent_s: float = 0.0
    stamps: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    end_s: float = 0.0
    status: str = INCOMPLETE
    message: str = ""
    constraint: str = ""
    """The resource that was short, if a refusal named it."""
    accepted: Accepted | None = None
    finished: Finished | None = None

    @property
    def late_ms(self) -> float:
        """Delay of sending, by this client's own fault."""
        return (self.sent_s - self.planned.at_s) * 1e3

    @property
    def output_tokens(self) -> int:
        return sum(self.counts)

    @property
    def ttft_ms(self) -> float | None:
        """From due to the first event with tokens."""
        return (self.stamps[0] - self.planned.at_s) * 1e3 if self.stamps else None

    @property
    def tpot_ms(self) -> float | None:
        """First to last token, over the tokens after those of the first event; None without any."""
        later = self.output_tokens - self.counts[0] if self.counts else 0
        return (self.stamps[-1] - self.stamps[0]) * 1e3 / later if later else None

    @property
    def heard_s(self) -> list[float]:
        """The times that a reader of the stream waits for: events with tokens, and after them a bad end."""
        return [*self.stamps, self.end_s] if self.status != OK and self.stamps else self.stamps

    @property
    def gaps_ms(self) -> list[float]:
        """Between one of `heard_s` and the next."""
        return [(after - before) * 1e3 for before, after in pairwise(self.heard_s)]

    @property
    def total_ms(self) -> float:
        """From due to its end."""
        return (self.end_s - self.planned.at_s) * 1e3

    @property
    def admitted(self) -> bool:
        return self.accepted is not None

    @property
    def refused(self) -> bool:
        """Refused for want of room, before it was accepted."""
        return self.status == REFUSED and not self.admitted

    @property
    def ttft_kept(self) -> bool | None:
        """None without such an objective."""
        return _kept(self.planned.traffic.ttft_ms, self.ttft_ms, self.status == OK)

    @property
    def tpot_kept(self) -> bool | None:
        """None without such an objective, which an answer of one token keeps."""
        return _kept(self.planned.traffic.tpot_ms, self.tpot_ms or 0.0, self.status == OK)

    @property
    def kept(self) -> bool:
        """Whether it ended well and kept every objective."""
        return self.status == OK and self.ttft_kept is not False and self.tpot_kept is not False


def _kept(objective_ms: float | None, achieved_ms: float | None, ended_well: bool) -> bool | None:
    if objective_ms is None:
        return None
    return ended_well and achieved_ms is not None and achieved_ms <= objective_ms
