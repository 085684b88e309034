"""What the receiver's ledger keeps and reports, and its limits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from enum import Enum, auto

from kvtransfer.blocks.pool import BlockPool, PoolCorrupt
from kvtransfer.handoffs.messages import Grant


class GrantState(Enum):
    GRANTED = auto()
    RECEIVING = auto()
    RESIDENT = auto()
    ABORTING = auto()


class LedgerOutcome(Enum):
    PENDING = auto()  # noted; not resident yet
    RESIDENT = auto()  # became resident by this very call: once for each grant
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
    """A snapshot. `writers` have a live lease; `tombstones` are the ended attempts that are remembered."""

    granted: int
    receiving: int
    resident: int
    aborting: int
    quarantined_blocks: int
    writers: int
    tombstones: int


@dataclass(frozen=True, slots=True)
class CancelAnswer:
    """Whether a cancel gave up a handoff, and the grant that is resident, which the worker ends."""

    aborted: bool
    resident: Grant | None


@dataclass(slots=True)
class LedgerEntry:
    """A grant until it is RELEASED. `missing`: indices that have not landed; `table`: a resident's blocks, grown ones
    included; `payload`: the first commit's."""

    grant: Grant
    digests: tuple[bytes, ...]
    missing: set[int]
    table: list[int]
    state: GrantState = GrantState.GRANTED
    committed: bool = False
    payload: object = None
    quarantined: list[int] = field(default_factory=list)


def check_books(pool: BlockPool, entries: Collection[LedgerEntry]) -> None:
    """Raises `PoolCorrupt` where a ledger's entries and its pool disagree. O(pool + granted blocks)."""
    pool.check_integrity()
    aborting = [entry for entry in entries if entry.state is GrantState.ABORTING]
    holds = Counter(block for entry in entries if entry.state is not GrantState.ABORTING for block in entry.table)
    if any(pool.holds(block) < count for block, count in holds.items()):
        raise PoolCorrupt("a granted block is not held")
    quarantined = [block for entry in aborting for block in entry.quarantined]
    if len(set(quarantined)) != len(quarantined) or not all(map(pool.quarantined, quarantined)):
        raise PoolCorrupt("an abandoned block is not quarantined, or twice")
    if len(quarantined) != pool.statistics().quarantined:
        raise PoolCorrupt("a quarantined block belongs to no handoff")
