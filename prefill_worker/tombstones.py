"""Attempts that are over: a late or repeated command for one must not bring it back."""

from __future__ import annotations

from baton.spec import AttemptKey
from kvtransfer.handoffs.leases import LeaseTable

SECONDS = 120.0
LIMIT = 100_000


class Tombstones:
    """Remembers each for `SECONDS`, and at most `LIMIT` of them: past that, the oldest is forgotten early."""

    def __init__(self) -> None:
        self._table: LeaseTable[AttemptKey] = LeaseTable()

    def __len__(self) -> int:
        return len(self._table)

    def __contains__(self, attempt: AttemptKey) -> bool:
        return attempt in self._table

    def add(self, attempt: AttemptKey, now: float) -> None:
        """It is over, or was cancelled before it came."""
        self._table.grant(attempt, now, SECONDS)
        if len(self._table) > LIMIT:
            self._table.pop_earliest()

    def expire(self, now: float) -> None:
        """Forgets what no peer can still mean."""
        self._table.expire(now)
