"""A receiver's memory of its writers: their leases, their open handoffs, and which of them have ended."""

from __future__ import annotations

from baton.spec import HandoffKey
from kvtransfer.handoffs.leases import LeaseTable


class Writers:
    """By incarnation. Pure; time is monotonic seconds. One lease covers all of a writer's grants.

    An ended writer is remembered for `memory_s`, so that its late messages open nothing.
    """

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
        """The writers whose lease ran out by `now`."""
        self._ended.expire(now)
        return self._leases.expire(now)
