"""A request's timers, by name."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from baton.errors import BatonError
from baton.rpc import awake


class Timers:
    """At most one of each name; a new one replaces it."""

    def __init__(self) -> None:
        self._timers: dict[str, asyncio.TimerHandle | awake.Timer] = {}

    def arm(self, name: str, timer: asyncio.TimerHandle | awake.Timer) -> None:
        self.disarm(name)
        self._timers[name] = timer

    def later(self, name: str, seconds: float, act: Callable[[], None], failed: Callable[[BatonError], None]) -> None:
        """Arms one that calls `act`, and `failed` with a BatonError that this raises."""

        def run() -> None:
            try:
                act()
            except BatonError as error:
                failed(error)

        self.arm(name, asyncio.get_running_loop().call_later(seconds, run))

    def disarm(self, *names: str) -> None:
        for name in names:
            if (timer := self._timers.pop(name, None)) is not None:
                timer.cancel()

    def clear(self) -> None:
        self.disarm(*list(self._timers))
