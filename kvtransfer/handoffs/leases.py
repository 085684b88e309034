"""Leases on things that another process holds.

A lease travels as a duration; each side puts it on its own monotonic clock. The grantor counts from sending its reply,
the holder from sending its request, which came earlier: so the holder always stops before the grantor takes back.
Time only ends a wait. It is no proof that a peer stopped writing.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)


class LeaseTable(Generic[K]):
    """The grantor's side: a deadline for each key. Not thread-safe.

    A heap with lazy deletion: each live key has at least one entry that is not later than its deadline. An early entry
    at the top is pushed back with the true deadline, so an extension costs O(1). Memory is O(live keys).
    """

    def __init__(self) -> None:
        self._until: dict[K, float] = {}
        self._heap: list[tuple[float, int, K]] = []
        self._pushed = 0

    def __len__(self) -> int:
        return len(self._until)

    def __contains__(self, key: K) -> bool:
        return key in self._until

    def grant(self, key: K, now: float, seconds: float) -> None:
        """Set the lease of `key` to `now + seconds`, be that later or earlier than before."""
        until = now + seconds
        known = self._until.get(key)
        self._until[key] = until
        if known is None or until < known:
            self._push(until, key)

    def renew(self, key: K, now: float, seconds: float) -> bool:
        """Extend a live lease to `now + seconds` if that is later. False when there is none: it is never revived."""
        known = self._until.get(key)
        if known is None or known <= now:
            return False
        self._until[key] = max(known, now + seconds)
        return True

    def drop(self, key: K) -> bool:
        """End the lease without expiry. False when there was none."""
        if self._until.pop(key, None) is None:
            return False
        self._compact()
        return True

    def expire(self, now: float) -> list[K]:
        """Remove and return the keys whose deadline is at or before `now`, the earliest first."""
        gone: list[K] = []
        while (until := self.next_deadline()) is not None and until <= now:
            gone.append(self._pop())
        return gone

    def pop_earliest(self) -> K | None:
        """Remove and return the key that would expire first; None when the table is empty."""
        return None if self.next_deadline() is None else self._pop()

    def next_deadline(self) -> float | None:
        """The earliest deadline, in monotonic seconds; None without a lease."""
        while self._heap:
            until, _, key = self._heap[0]
            true = self._until.get(key)
            if true == until:
                return until
            heapq.heappop(self._heap)
            if true is not None and true > until:
                self._push(true, key)
        return None

    def _pop(self) -> K:
        key = heapq.heappop(self._heap)[2]
        del self._until[key]
        return key

    def _push(self, until: float, key: K) -> None:
        self._pushed += 1  # breaks ties, so that keys need no order
        heapq.heappush(self._heap, (until, self._pushed, key))
        self._compact()

    def _compact(self) -> None:
        """Rebuild the heap when most of it is stale: O(1) per change, amortized."""
        if len(self._heap) <= 2 * len(self._until) + 64:
            return
        self._heap = [(until, n, key) for n, (key, until) in enumerate(self._until.items())]
        self._pushed = len(self._heap)
        heapq.heapify(self._heap)


class PeerLease:
    """The holder's side: one lease that covers all that this process holds with one peer.

    Call `asked` for each request that the peer answers with a lease, and `granted` for each reply; replies come in the
    order of the requests. Not thread-safe.
    """

    def __init__(self) -> None:
        self.deadline: float | None = None
        """In monotonic seconds; None before the first reply."""
        self._asked: deque[float] = deque()
        self._seconds = 0.0

    def asked(self, now: float) -> None:
        self._asked.append(now)

    def granted(self, seconds: float) -> None:
        """Answers the oldest open request; the lease counts from when that was sent."""
        assert self._asked, "a lease without a request"
        sent = self._asked.popleft()
        self._seconds = seconds
        self.deadline = max(self.deadline or 0.0, sent + seconds)

    def valid(self, now: float) -> bool:
        return self.deadline is not None and now < self.deadline

    def renew_at(self) -> float | None:
        """After a third of the lease, so that two renewals may be lost. None before the first reply."""
        return None if self.deadline is None else self.deadline - self._seconds * 2 / 3
