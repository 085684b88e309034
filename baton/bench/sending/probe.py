"""Measures this client's own health: the lag of its event loop and its use of a core."""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import dataclass, field

TICK_S = 0.02
CPU_WINDOW_S = 1.0


@dataclass(frozen=True, slots=True)
class Second:
    """About a second of the client, up to `until` by `time.perf_counter`. Shares of one core used by the loop's thread,
    at most 1, and by the whole process, with gRPC's threads."""

    until: float
    loop_share: float
    process_share: float


@dataclass(slots=True)
class ClientLoad:
    """`lags_ms` are the delays of a timer 50 times a second, including those that fell due while the loop was stuck."""

    lags_ms: list[float] = field(default_factory=list)
    seconds: list[Second] = field(default_factory=list)
    cores: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))


class Probe:
    """Runs as a task of the loop that it measures."""

    def __init__(self) -> None:
        self.load = ClientLoad()

    async def run(self) -> None:
        """Ends by cancellation only."""
        began, loop, process = time.perf_counter(), time.thread_time(), time.process_time()
        due = began + TICK_S
        while True:
            await asyncio.sleep(due - time.perf_counter())
            now = time.perf_counter()
            self.load.lags_ms.append(max(0.0, now - due) * 1e3)  # timers have whole milliseconds and may be early
            due += TICK_S
            while due <= now:  # each of these timers is late too: one lag alone would hide a long stall
                self.load.lags_ms.append((now - due) * 1e3)
                due += TICK_S
            if now - began >= CPU_WINDOW_S:
                used = time.thread_time() - loop, time.process_time() - process
                self.load.seconds.append(Second(now, *(share / (now - began) for share in used)))
                began, loop, process = now, time.thread_time(), time.process_time()
