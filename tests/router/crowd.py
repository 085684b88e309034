"""A router with many workers around it, each behind a real gRPC server, all in one process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from baton.config import RouterConfig
from baton.rpc import net
from baton.spec import SequenceSpec
from router.app import Router
from tests.router.conftest import Cluster
from tests.router.doubles import WorkerDouble


@asynccontextmanager
async def crowd(prefill: int, decode: int, output: Callable[[SequenceSpec], list[int]]) -> AsyncIterator[Cluster]:
    """So many workers, registered at the same time and usable; whatever they generate, `output` says."""
    router = Router(RouterConfig(listen="127.0.0.1:0", name="router"))
    await router.start()
    workers = [WorkerDouble(f"p{index:03}", "prefill", output) for index in range(prefill)]
    workers += [WorkerDouble(f"d{index:03}", "decode", output) for index in range(decode)]
    try:
        async with net.open_channel(router.process.address) as channel:
            cluster = Cluster(router, channel)
            cluster.workers = {worker.process.name: worker for worker in workers}
            await asyncio.gather(*(worker.start() for worker in workers))
            for worker in workers:
                worker.peers = cluster.workers
            await asyncio.gather(*(worker.join(router.process.address) for worker in workers))
            await cluster.until(lambda: all(worker.usable for worker in router.registry.workers()))
            yield cluster
    finally:
        await router.stop()
        await asyncio.gather(*(worker.stop() for worker in workers))
