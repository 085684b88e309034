"""How well this client itself keeps up: the lag of its event loop, and the share of a core that it burns."""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import dataclass, field

TICK_S = 0.02
CPU_WINDOW_S = 1.0


@dataclass(slots=True)
class ClientLoad:
    """`lags_ms`: how much later than due the loop ran a timer, 50 times a second. CPU as shares of one core."""

    lags_ms: list[float] = field(default_factory=list)
    loop_shares: list[float] = field(default_factory=list)
    """Of the loop's thread, second by second: at 1 it is full."""
    process_share: float = 0.0
    """Of the whole process over the run; gRPC's own threads included."""
    cores: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))


class Probe:
    """Measures until it is cancelled; to be run as a task of the loop that does the work."""

    def __init__(self) -> None:
        self.load = ClientLoad()

    async def run(self) -> None:
        """Ends by cancellation only."""
        began, used = time.perf_counter(), time.process_time()
        window, spent = began, time.thread_time()
        due = began + TICK_S
        try:
            while True:
                await asyncio.sleep(due - time.perf_counter())
                now = time.perf_counter()
                self.load.lags_ms.append(max(0.0, now - due) * 1e3)  # timers have whole milliseconds: early is on time
                due = max(due, now) + TICK_S
                if now - window >= CPU_WINDOW_S:
                    self.load.loop_shares.append((time.thread_time() - spent) / (now - window))
                    window, spent = now, time.thread_time()
        finally:
            self.load.process_share = (time.process_time() - used) / max(time.perf_counter() - began, 1e-9)
