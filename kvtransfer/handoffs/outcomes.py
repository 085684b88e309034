"""What the receiver's ledger reports, and its limits."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

from kvtransfer.handoffs.messages import Grant


class GrantState(Enum):
    GRANTED = auto()
    RECEIVING = auto()
    RESIDENT = auto()
    ABORTING = auto()


class Outcome(Enum):
    """What a `landed` or `commit` did."""

    PENDING = auto()  # noted; not resident yet
    RESIDENT = auto()  # became resident by this very call: happens once for each grant
    ALREADY = auto()  # was resident before: answer as the first time
    IGNORED = auto()  # unknown, finished, aborted, or another generation
    CONFLICT = auto()  # contradicts the grant; the caller should abort it


@dataclass(frozen=True, slots=True)
class LedgerLimits:
    """Durations in seconds. `lease_s`: of a writer without a renewal; `handoff_s`: from grant to resident, at most;
    `tombstone_s`: how long an ended attempt is remembered, at least the other two; `tombstones`: how many, at most."""

    lease_s: float = 10.0
    handoff_s: float = 120.0
    tombstone_s: float = 120.0
    tombstones: int = 100_000
    retry_after_s: float = 0.25

    def __post_init__(self) -> None:
        for name in ("lease_s", "handoff_s", "tombstones", "retry_after_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")
        if self.tombstone_s < max(self.lease_s, self.handoff_s):
            raise ValueError(f"tombstone_s {self.tombstone_s} is shorter than the longest lease")


@dataclass(frozen=True, slots=True)
class LedgerStatistics:
    """A snapshot: grants by state, blocks that wait for proof, remembered attempts, and counts of what was refused."""

    granted: int
    receiving: int
    resident: int
    aborting: int
    quarantined_blocks: int
    writers: int
    tombstones: int


@dataclass(frozen=True, slots=True)
class Cancelled:
    """What a cancel met: whether a handoff was given up, and the grant that is resident (the worker ends that one)."""

    aborted: bool
    resident: Grant | None
