"""Whole clusters of real processes, one per module and shape, and what must hold when a test is over."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import psutil

from baton.client import Client
from baton.client.types import ProcessStatus
from baton.errors import Unavailable
from baton.launch.cluster import ClusterConfig, LocalCluster

VOCABULARY = 49_152
SETTLE_S = 20.0


@dataclass(frozen=True, slots=True)
class Running:
    """A cluster with a client of its router."""

    cluster: LocalCluster
    client: Client

    async def statuses(self) -> list[ProcessStatus]:
        """What each live worker holds; one that has just died is none any more."""
        found = []
        for child in self.cluster.processes:
            if child.role == "router" or not child.running:
                continue
            try:
                async with Client(child.address) as client:
                    found.append(await client.status())
            except Unavailable:
                async with asyncio.timeout(SETTLE_S):
                    await child.wait_exited()  # or it is a live worker that does not answer
        return found


@asynccontextmanager
async def running(*worker_flags: str, **options: object) -> AsyncIterator[Running]:
    """A cluster on a free port; afterwards none of its processes is left. The flags are for each worker."""
    config = ClusterConfig(**{"listen": "127.0.0.1:0", "pool_tokens": 12_288} | options)  # type: ignore[arg-type]
    async with LocalCluster(config, worker_flags=worker_flags) as cluster:
        pids = [child.pid for child in cluster.processes]
        async with Client(cluster.address) as client:
            yield Running(cluster, client)
    assert not [pid for pid in pids if psutil.pid_exists(pid)], "a process outlived its cluster"


LIVE_NAMES = ("attempts", "deliveries", "residents", "grants", "aborting")


def held(status: ProcessStatus) -> dict[str, int]:
    """What a worker that has nothing to do should not have."""
    pool = status.pool
    assert pool is not None, "a worker has a pool"
    found = {"held blocks": pool.held, "quarantined blocks": pool.quarantined}
    found |= {name: status.live[name] for name in LIVE_NAMES if name in status.live}
    return {name: count for name, count in found.items() if count}


async def waiting(cluster: Running) -> int:
    """Requests that the router has not forgotten, if there is a router."""
    if not next(child.running for child in cluster.cluster.processes if child.role == "router"):
        return 0
    live = (await cluster.client.status()).live
    return live.get("requests", 0) + live.get("cancelling", 0)


async def settled(cluster: Running) -> None:
    """Waits until every worker has let go of everything; then their books must balance."""
    async with asyncio.timeout(SETTLE_S):
        while any(held(status) for status in await cluster.statuses()) or await waiting(cluster):
            await asyncio.sleep(0.05)
    for status in await cluster.statuses():
        assert status.pool is not None
        assert status.pool.integrity_error == "", status.pool.integrity_error


def prompt_of(length: int, seed: int = 0) -> list[int]:
    """Random ordinary tokens, the same for the same arguments."""
    generator = random.Random(f"{length}/{seed}")
    return [generator.randrange(100, VOCABULARY) for _ in range(length)]
