"""Cluster layouts on the same two cores, for benchmarks that compare them.

Prefill worker (or one of two colocated workers), router and load generator on the first core, the decode worker (or
the other one) on the last.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from baton.launch.cluster import ClusterConfig, LocalCluster

Start = Callable[[], contextlib.AbstractAsyncContextManager[str]]


@dataclass(frozen=True, slots=True)
class Mode:
    """`start()` runs a cluster, with all processes pinned, and gives its address."""

    name: str
    start: Start


@contextlib.asynccontextmanager
async def disaggregated() -> AsyncIterator[str]:
    """One worker of each role."""
    async with _pinned(_config(path="disaggregated")) as address:
        yield address


@contextlib.asynccontextmanager
async def adaptive() -> AsyncIterator[str]:
    """One worker of each role; each request takes the path that keeps its objectives."""
    async with _pinned(_config(path="adaptive")) as address:
        yield address


@contextlib.asynccontextmanager
async def simulated() -> AsyncIterator[str]:
    """As adaptive, with simulated workers of twice the embedded model's speed."""
    async with _pinned(_config(path="adaptive", engine="simulated", sim_speed=2.0)) as address:
        yield address


def colocated(tpot_budget_ms: float = 0.0) -> Mode:
    """A worker for both phases on each core. Its chunks fit the strictest objective's slack in a step, or the budget if
    that is less."""

    @contextlib.asynccontextmanager
    async def start() -> AsyncIterator[str]:
        async with _pinned(_config(colocated=2, tpot_budget_ms=tpot_budget_ms)) as address:
            yield address

    return Mode("colocated", start)


@contextlib.asynccontextmanager
async def together(modes: Sequence[Mode]) -> AsyncIterator[dict[str, str]]:
    """The addresses, by mode name, of clusters that run at once on the same cores, so that each can get the same load
    within a minute. An idle 1+1 cluster takes 2 % of a core."""
    cores, addresses = os.sched_getaffinity(0), dict[str, str]()
    async with contextlib.AsyncExitStack() as stack:
        for mode in modes:
            _bind(os.getpid(), cores)  # a cluster uses the cores of its starter
            addresses[mode.name] = await stack.enter_async_context(mode.start())
        yield addresses


def _config(**settings: Any) -> ClusterConfig:
    return ClusterConfig(listen="127.0.0.1:0", pin=True, start_s=120.0, **settings)


DISAGGREGATED, ADAPTIVE = Mode("disaggregated", disaggregated), Mode("adaptive", adaptive)
MODES = (DISAGGREGATED, ADAPTIVE, colocated())


@contextlib.asynccontextmanager
async def _pinned(config: ClusterConfig) -> AsyncIterator[str]:
    cores = sorted(os.sched_getaffinity(0))
    async with LocalCluster(config) as cluster:
        router = next(child for child in cluster.processes if child.role == "router")
        with contextlib.ExitStack() as stack:
            for pid in (router.pid, os.getpid()):
                stack.enter_context(_on_core(pid, cores[0]))
            yield cluster.address


@contextlib.contextmanager
def _on_core(pid: int, core: int) -> Iterator[None]:
    """Pins all threads of a process to one core; unpins those of this process afterwards."""
    before = os.sched_getaffinity(pid)
    _bind(pid, {core})
    try:
        yield
    finally:
        if pid == os.getpid():
            _bind(pid, before)


def _bind(pid: int, cores: set[int]) -> None:
    for thread in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(int(thread.name), cores)
