"""A decode worker's memory of its peers: of attempts and of writers. Pure; time is monotonic seconds.

A message for a finished or cancelled attempt must not bring it back. So the memory outlives the attempt by the longest
lease, after which no peer still speaks of it. Beyond `limit` ended attempts the oldest is forgotten.
"""

from __future__ import annotations

from dataclasses import dataclass

from baton.spec import AttemptKey, HandoffKey, RefusalReason
from kvtransfer.handoffs.leases import LeaseTable
from kvtransfer.handoffs.messages import Refusal


@dataclass(slots=True)
class _Attempt:
    highest: int = 0
    ended: Refusal | None = None  # the answer to the highest handoff once it is over
    cancelled: bool = False


class AttemptMemory:
    """The latest handoff of each attempt, and how that ended. An attempt with a live grant is never forgotten."""

    def __init__(self, seconds: float, limit: int) -> None:
        self._seconds = seconds
        self._limit = limit
        self._attempts: dict[AttemptKey, _Attempt] = {}
        self._ended: LeaseTable[AttemptKey] = LeaseTable()

    @property
    def tombstones(self) -> int:
        return len(self._ended)

    def verdict(self, key: HandoffKey) -> Refusal | None:
        """Why `key` can't be opened; None when it is new, or the latest and still live."""
        attempt = self._attempts.get(key.attempt)
        if attempt is None:
            return None
        if attempt.cancelled:
            return Refusal(key, RefusalReason.CANCELLED, "the attempt was cancelled")
        if key.handoff < attempt.highest:
            return Refusal(key, RefusalReason.EXPIRED, f"handoff {attempt.highest} took its place")
        return attempt.ended if key.handoff == attempt.highest else None

    def is_cancelled(self, attempt: AttemptKey) -> bool:
        known = self._attempts.get(attempt)
        return known is not None and known.cancelled

    def latest(self, attempt: AttemptKey) -> HandoffKey | None:
        known = self._attempts.get(attempt)
        return HandoffKey(attempt, known.highest) if known else None

    def opened(self, key: HandoffKey) -> None:
        attempt = self._attempts.setdefault(key.attempt, _Attempt())
        attempt.highest, attempt.ended = key.handoff, None
        self._ended.drop(key.attempt)

    def ended(self, refusal: Refusal, now: float) -> None:
        """`refusal` answers the handoff from now on. Ignored for an older handoff than the latest."""
        attempt = self._attempts.setdefault(refusal.key.attempt, _Attempt())
        if refusal.key.handoff < attempt.highest:
            return
        attempt.highest, attempt.ended = refusal.key.handoff, refusal
        self._bury(refusal.key.attempt, now)

    def cancelled(self, attempt: AttemptKey, now: float, live: bool) -> None:
        """No handoff of this attempt may open any more. `live`: one is resident and ends later."""
        self._attempts.setdefault(attempt, _Attempt()).cancelled = True
        if not live:
            self._bury(attempt, now)

    def expire(self, now: float) -> None:
        for attempt in self._ended.expire(now):
            del self._attempts[attempt]

    def _bury(self, attempt: AttemptKey, now: float) -> None:
        self._ended.grant(attempt, now, self._seconds)
        while len(self._ended) > self._limit:
            oldest = self._ended.pop_earliest()
            assert oldest is not None, "an empty table is over its limit"
            del self._attempts[oldest]


class Writers:
    """The writers' leases and open handoffs, by incarnation. One lease covers all of a writer's grants. An ended writer
    is remembered for `memory_s`, so that its late messages open nothing."""

    def __init__(self, lease_s: float, memory_s: float) -> None:
        self._lease_s = lease_s
        self._memory_s = memory_s
        self._leases: LeaseTable[str] = LeaseTable()
        self._ended: LeaseTable[str] = LeaseTable()
        self._handoffs: dict[str, set[HandoffKey]] = {}

    def __len__(self) -> int:
        """Writers with a live lease."""
        return len(self._leases)

    def renew(self, writer: str, now: float) -> bool:
        """False when the writer has no live lease."""
        return self._leases.renew(writer, now, self._lease_s)

    def is_live(self, writer: str) -> bool:
        return writer in self._leases

    def heard(self, writer: str, now: float) -> None:
        """The writer sent an Open: extend its lease, or begin one."""
        if not self.renew(writer, now):
            self._leases.grant(writer, now, self._lease_s)

    def add(self, writer: str, key: HandoffKey) -> None:
        self._handoffs.setdefault(writer, set()).add(key)

    def discard(self, writer: str, key: HandoffKey) -> None:
        keys = self._handoffs[writer]
        keys.discard(key)
        if not keys:
            del self._handoffs[writer]

    def handoffs(self, writer: str) -> list[HandoffKey]:
        """The writer's handoffs that are neither resident nor over, in a stable order."""
        return sorted(self._handoffs.get(writer, ()), key=lambda key: (key.attempt, key.handoff))

    def end(self, writer: str, now: float) -> None:
        self._ended.grant(writer, now, self._memory_s)
        self._leases.drop(writer)

    def has_ended(self, writer: str) -> bool:
        return writer in self._ended

    def expire(self, now: float) -> list[str]:
        self._ended.expire(now)
        return self._leases.expire(now)
