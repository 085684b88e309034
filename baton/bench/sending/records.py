"""What happened to one request, by the client's clock.

    planned -> sent -> accepted -> first token -> ... -> ended        status OK, or a gRPC status name

Times are seconds after the start of the run. Latencies count from when the request was due, not from when it went out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

from baton.bench.schedule.plan import Planned
from baton.client.types import Accepted, Finished

OK, REFUSED, INCOMPLETE = "OK", "RESOURCE_EXHAUSTED", "INCOMPLETE"
"""INCOMPLETE: the stream ended without an error and without a result."""


@dataclass(slots=True)
class Record:
    """Filled in by the driver while the request is under way. One stamp and one count per event with tokens."""

    planned: Planned
    sent_s: float = 0.0
    stamps: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    end_s: float = 0.0
    status: str = INCOMPLETE
    message: str = ""
    constraint: str = ""
    """What was short, where a refusal said it."""
    accepted: Accepted | None = None
    finished: Finished | None = None

    @property
    def late_ms(self) -> float:
        """How long after its time it was sent: this client's own fault."""
        return (self.sent_s - self.planned.at_s) * 1e3

    @property
    def output_tokens(self) -> int:
        """Received."""
        return sum(self.counts)

    @property
    def ttft_ms(self) -> float | None:
        """From the time it was due to the first event with tokens."""
        return (self.stamps[0] - self.planned.at_s) * 1e3 if self.stamps else None

    @property
    def tpot_ms(self) -> float | None:
        """First to last token, over the tokens after those of the first event; None where there are none."""
        later = self.output_tokens - self.counts[0] if self.counts else 0
        return (self.stamps[-1] - self.stamps[0]) * 1e3 / later if later else None

    @property
    def heard_s(self) -> list[float]:
        """When something came that somebody who reads along had waited for: tokens, and behind tokens a bad end."""
        return [*self.stamps, self.end_s] if self.status != OK and self.stamps else self.stamps

    @property
    def gaps_ms(self) -> list[float]:
        """Between one such moment and the next."""
        return [(after - before) * 1e3 for before, after in pairwise(self.heard_s)]

    @property
    def total_ms(self) -> float:
        """From the time it was due to its end."""
        return (self.end_s - self.planned.at_s) * 1e3

    @property
    def admitted(self) -> bool:
        """Whether the server promised to serve it."""
        return self.accepted is not None

    @property
    def refused(self) -> bool:
        """Turned away before it was accepted, for want of room."""
        return self.status == REFUSED and not self.admitted

    @property
    def ttft_kept(self) -> bool | None:
        """None without such an objective."""
        return _kept(self.planned.traffic.ttft_ms, self.ttft_ms, self.status == OK)

    @property
    def tpot_kept(self) -> bool | None:
        """None without such an objective. An answer of one token keeps it."""
        return _kept(self.planned.traffic.tpot_ms, self.tpot_ms or 0.0, self.status == OK)

    @property
    def kept(self) -> bool:
        """It ended well and kept every objective it had."""
        return self.status == OK and self.ttft_kept is not False and self.tpot_kept is not False


def _kept(objective_ms: float | None, achieved_ms: float | None, ended_well: bool) -> bool | None:
    if objective_ms is None:
        return None
    return ended_well and achieved_ms is not None and achieved_ms <= objective_ms


def values(records: list[Record], of: Callable[[Record], float | None]) -> list[float]:
    """What is not None of a property."""
    return [value for record in records if (value := of(record)) is not None]
