"""A process that is stopped while a load runs, and what is known of when."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import psutil

from baton.bench.sending.driver import Progress
from tests.rpc.waiting import until


@dataclass(slots=True)
class Stall:
    """By `time.perf_counter`: the process stood still from `stopped` to `going` at least, and from `asked` at most."""

    asked: float
    stopped: float
    going: float = 0.0

    @property
    def at_least_ms(self) -> float:
        return (self.going - self.stopped) * 1e3

    @property
    def at_most_ms(self) -> float:
        return (self.going - self.asked) * 1e3


@asynccontextmanager
async def stalled(pid: int) -> AsyncIterator[Stall]:
    """The process stands still within the block; afterwards `going` is known."""
    asked = time.perf_counter()
    os.kill(pid, signal.SIGSTOP)
    try:
        await until(lambda: psutil.Process(pid).status() == psutil.STATUS_STOPPED, "the process stands still")
        stall = Stall(asked, time.perf_counter())
        yield stall
        stall.going = time.perf_counter()
    finally:
        os.kill(pid, signal.SIGCONT)


class Watched:
    """Follows a run's progress; to be handed to `run_plan`."""

    def __init__(self) -> None:
        self._begun: asyncio.Future[Progress] = asyncio.get_running_loop().create_future()

    def __call__(self, progress: Progress) -> None:
        if not self._begun.done():
            self._begun.set_result(progress)

    async def until(self, condition: Callable[[Progress], object], what: str) -> Progress:
        """Waits for a state of the run. The driver keeps the returned object up to date."""
        async with asyncio.timeout(30):
            progress = await self._begun
        await until(lambda: condition(progress), what)
        return progress
