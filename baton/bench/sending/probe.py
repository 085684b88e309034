"""How well this client itself keeps up: the lag of its event loop, and the share of a core that it burns."""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import dataclass, field

TICK_S = 0.02
CPU_WINDOW_S = 1.0


@dataclass(frozen=True, slots=True)
class Second:
    """About a second of the client, until `until` by `time.perf_counter`. Shares of one core: the loop's thread, which
    is full at 1, and the whole process, with gRPC's own threads."""

    until: float
    loop_share: float
    process_share: float


@dataclass(slots=True)
class ClientLoad:
    """`lags_ms`: how much later than due the loop ran a timer, 50 times a second, also those that fell due while it
    stood still."""

    lags_ms: list[float] = field(default_factory=list)
    seconds: list[Second] = field(default_factory=list)
    cores: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))


class Probe:
    """Measures until it is cancelled; to be run as a task of the loop that does the work."""

    def __init__(self) -> None:
        self.load = ClientLoad()

    async def run(self) -> None:
        """Ends by cancellation only."""
        began, loop, process = time.perf_counter(), time.thread_time(), time.process_time()
        due = began + TICK_S
        while True:
            await asyncio.sleep(due - time.perf_counter())
            now = time.perf_counter()
            self.load.lags_ms.append(max(0.0, now - due) * 1e3)  # timers have whole milliseconds: early is on time
            due += TICK_S
            while due <= now:  # each of these would have been late too: one lag would hide how long the loop stood
                self.load.lags_ms.append((now - due) * 1e3)
                due += TICK_S
            if now - began >= CPU_WINDOW_S:
                used = time.thread_time() - loop, time.process_time() - process
                self.load.seconds.append(Second(now, *(share / (now - began) for share in used)))
                began, loop, process = now, time.thread_time(), time.process_time()
