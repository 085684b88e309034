"""Ways to lay a cluster out on the same two cores, for benchmarks that compare them.

Disaggregated: prefill worker, router and load generator on the first core, the decode worker on the last.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from baton.launch.cluster import ClusterConfig, LocalCluster

Start = Callable[[], contextlib.AbstractAsyncContextManager[str]]


@dataclass(frozen=True, slots=True)
class Mode:
    """`start()` gives a cluster's address while its block lasts, everything pinned."""

    name: str
    start: Start


@contextlib.asynccontextmanager
async def disaggregated() -> AsyncIterator[str]:
    """One worker of each role."""
    async with _pinned(ClusterConfig(listen="127.0.0.1:0", pin=True, start_s=120.0)) as address:
        yield address


MODES = (Mode("disaggregated", disaggregated),)


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
    """All threads of a process stay on one core; those of this process are let go afterwards."""
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
