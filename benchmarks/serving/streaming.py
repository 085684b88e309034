"""Many concurrent streams through a real cluster of simulated workers, and their cost in the router.

One channel has all streams. Every step sends one token of every sequence, and every token must reach the client in an
event of its own: a run with merged tokens is invalid.
"""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from baton.cost import StepCost
from baton.launch.cluster import ClusterConfig, LocalCluster
from baton.rpc import net
from baton.v1 import generation_pb2 as gen
from baton.v1.generation_pb2_grpc import GenerationStub

START_S, STREAM_S = 120.0, 300.0
PROMPT = 24
TICK_S = 1 / os.sysconf("SC_CLK_TCK")


@dataclass(slots=True)
class Tally:
    """The client's counts so far."""

    flowing: int = 0
    ended: int = 0
    tokens: int = 0
    events: int = 0


@dataclass(frozen=True, slots=True)
class Flow:
    """A window of steady streaming."""

    streams: int
    tokens: int
    merged: int
    seconds: float
    router_cpu_s: float
    sockets: dict[str, int]

    @property
    def cpu_us(self) -> float:
        """Router CPU time per token that reached the client."""
        return self.router_cpu_s / self.tokens * 1e6


@asynccontextmanager
async def simulated(step_ms: float, sequences: int, **options: Any) -> AsyncIterator[LocalCluster]:
    """A cluster with decode steps of constant time, and the embedded model's tokeniser."""
    costs = StepCost(chunk=5e-4, step=step_ms / 1e3)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "costs.json")
        path.write_text(json.dumps(asdict(costs)))  # noqa: ASYNC240 (nothing else runs yet)
        settings = {"pool_tokens": 1100 * sequences, "max_sequences": sequences} | options
        config = ClusterConfig(
            listen="127.0.0.1:0", engine="simulated", sim_kv_bytes_per_token=64, cost_model=str(path), **settings
        )
        async with LocalCluster(config) as cluster:
            yield cluster


async def steady(cluster: LocalCluster, streams: int, step_ms: float, window_s: float) -> Flow:
    """Starts the streams, waits until all flow, and measures for `window_s` before any ends."""
    tally = Tally()
    router = pid_of(cluster, "router")
    async with net.open_channel(cluster.address) as channel:
        calls = [GenerationStub(channel).Generate(_request(index), timeout=STREAM_S) for index in range(streams)]
        readers = [asyncio.create_task(_read(call, tally)) for call in calls]
        try:
            async with asyncio.timeout(START_S):
                while tally.flowing < streams:
                    await asyncio.sleep(0.05)
            await asyncio.sleep(4 * step_ms / 1e3)
            clock = asyncio.get_running_loop().time
            before, cpu, started = Tally(**asdict(tally)), cpu_s(router), clock()
            await asyncio.sleep(window_s)
            seconds, spent, tokens = clock() - started, cpu_s(router) - cpu, tally.tokens - before.tokens
            assert tally.ended == 0, "a stream ended within the window"
            merged = tokens - (tally.events - before.events)
            sockets = {child.name: _sockets(child.pid) for child in cluster.processes} | {
                "client": _sockets(os.getpid())
            }
        finally:
            for call in calls:
                call.cancel()
            await asyncio.gather(*readers, return_exceptions=True)
    return Flow(streams, tokens, merged, seconds, spent, sockets)


@contextmanager
def alone(pid: int, others: Sequence[int]) -> Iterator[None]:
    """Pins a process to the first core and the others to the last, as `taskset -a` does."""
    free = os.sched_getaffinity(0)
    for process, core in ((pid, min(free)), *((other, max(free)) for other in others)):
        _pin(process, {core})
    try:
        yield
    finally:
        for process in (pid, *others):
            _pin(process, free)


def _pin(pid: int, cores: set[int]) -> None:
    """All its threads; later threads inherit their starter's core."""
    for thread in psutil.Process(pid).threads():
        with suppress(ProcessLookupError):
            os.sched_setaffinity(thread.id, cores)


def pid_of(cluster: LocalCluster, role: str) -> int:
    return next(child.pid for child in cluster.processes if child.role == role)


def cpu_s(pid: int) -> float:
    """User and system time of a process, with all threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * TICK_S


def _sockets(pid: int) -> int:
    return len(psutil.Process(pid).net_connections(kind="all"))


def _request(index: int) -> gen.GenerateRequest:
    ids = [(index * 31 + place * 7) % 256 for place in range(PROMPT)]
    return gen.GenerateRequest(
        token_ids=gen.TokenIds(ids=ids),
        stopping=gen.Stopping(max_tokens=1000, ignore_eos=True),
        sampling=gen.Sampling(seed=index),
    )


async def _read(call: Any, tally: Tally) -> None:
    seen = 0
    async for event in call:
        count = len(event.tokens.ids)
        if not count:
            continue
        seen += count
        tally.tokens += count
        tally.events += 1
        tally.flowing += seen > 1 >= seen - count  # decoding: the first one came from the prefill worker
    tally.ended += 1
