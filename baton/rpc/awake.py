"""Time by which peers are judged: it stands still while this process is away.

A process that was suspended, or whose event loop one call held, has heard nobody. It must not count that time against
its peers, whose words lie unread in its sockets. So each look at the clock that comes late adds next to nothing, and
then the clock stands still for a moment, until what came meanwhile is read. Verdicts on silence, leases that this
process grants, and waits for an answer go by this clock; what a client asked for goes by real time.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import weakref
from collections.abc import AsyncIterator, Callable

TICK_S = 0.1
"""The loop looks at the clock so often, and a late look counts as one tick."""
LATE_S = 0.5
"""A look that comes so long after the one before has come late."""
CATCH_UP_S = 1.0
"""The longest that the clock stands still after a late look; not longer than it was late."""


class AwakeClock:
    """Looks are for the loop that the clock belongs to; `missed` is for any thread."""

    def __init__(self, real: Callable[[], float] = time.monotonic) -> None:
        self._real = real
        self._seen = real()
        self._still_until = self._seen
        self._away = 0.0

    def now(self) -> float:
        """Seconds, comparable with one another alone."""
        real = self._real()
        passed = real - self._seen
        if passed > LATE_S:
            self._away += passed - TICK_S
            self._still_until = real + min(passed, CATCH_UP_S)
        elif self._seen < self._still_until:
            self._away += min(real, self._still_until) - self._seen
        self._seen = real
        return real - self._away

    @property
    def still_s(self) -> float:
        """How long the clock still stands still."""
        return max(0.0, self._still_until - self._real())

    @property
    def missed(self) -> float:
        """Real seconds that did not count so far."""
        late = self._real() - self._seen
        return self._away + (late if late > LATE_S else 0.0)

    def tick(self, loop: asyncio.AbstractEventLoop) -> None:
        """Looks from now on every `TICK_S`, until the loop is closed."""
        self.now()
        loop.call_later(TICK_S, self.tick, loop)


_clocks: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, AwakeClock] = weakref.WeakKeyDictionary()


def clock() -> AwakeClock:
    """The running loop's."""
    loop = asyncio.get_running_loop()
    found = _clocks.get(loop)
    if found is None:
        found = _clocks[loop] = AwakeClock()
        found.tick(loop)
    return found


def now() -> float:
    return clock().now()


def catching_up() -> bool:
    """Whether this process was away, and what came meanwhile may not be read yet: no time for a verdict."""
    found = clock()
    found.now()
    return found.still_s > 0


class Timer:
    """Calls back once, when `seconds` have passed awake since it was made or last restarted."""

    def __init__(self, seconds: float, act: Callable[[], object]) -> None:
        self._clock, self._seconds, self._act = clock(), seconds, act
        self._loop = asyncio.get_running_loop()
        self._since = self._clock.now()
        self._handle: asyncio.TimerHandle | None = self._loop.call_later(seconds, self._fire)

    def restart(self) -> None:
        """Also after it has called back. Costs no more than a look at the clock otherwise."""
        self._since = self._clock.now()
        if self._handle is None:
            self._handle = self._loop.call_later(self._seconds, self._fire)

    def cancel(self) -> None:
        if self._handle is not None:
            self._handle.cancel()

    def _fire(self) -> None:
        left = max(self._since + self._seconds - self._clock.now(), self._clock.still_s)
        if left > 0:
            self._handle = self._loop.call_later(left, self._fire)
        else:
            self._handle = None
            self._act()


@contextlib.asynccontextmanager
async def patience(seconds: float) -> AsyncIterator[Timer]:
    """Raises TimeoutError in the block once its timer has not been restarted for so long."""
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(None) as limit:
        timer = Timer(seconds, lambda: limit.reschedule(loop.time()))
        try:
            yield timer
        finally:
            timer.cancel()
