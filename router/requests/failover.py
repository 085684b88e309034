"""Requests whose worker died, on their way to another attempt.

A dead worker may leave a thousand streams. They are placed a few at a time, by priority and then age, so that the event
loop serves others in between; the workers' queues and ledgers pace the computing.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import Callable

AT_ONCE, PAUSE_S = 4, 0.002


class Failovers:
    """Calls back each request in its turn. Lives on one event loop."""

    def __init__(self) -> None:
        self._waiting: list[tuple[int, float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, priority: int, arrived: float, place: Callable[[], None]) -> None:
        """`place` must not raise."""
        heapq.heappush(self._waiting, (-priority, arrived, next(self._numbers), place))
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(0.0, self._some)

    def _some(self) -> None:
        self._timer = None
        for _ in range(min(AT_ONCE, len(self._waiting))):
            heapq.heappop(self._waiting)[-1]()
        if self._waiting:
            self._timer = asyncio.get_running_loop().call_later(PAUSE_S, self._some)
