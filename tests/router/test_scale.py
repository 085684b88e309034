"""Many workers at one router, over real connections."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable

import psutil

from baton.v1 import generation_pb2 as gen
from tests.router.conftest import ids_of
from tests.router.crowd import crowd
from tests.router.tiny_model import EOS

WORKERS = 32  # of each role


async def test_64_workers_register_at_once_and_share_the_work() -> None:
    async with crowd(WORKERS, WORKERS, lambda spec: [*range(10, 14), EOS]) as cluster:
        assert len(cluster.router.registry.workers()) == 2 * WORKERS
        prefill = [worker for name, worker in cluster.workers.items() if name.startswith("p")]
        decode = [worker for name, worker in cluster.workers.items() if name.startswith("d")]
        gates = [worker.gate("queued") for worker in prefill]
        gates += [worker.gate("received") for worker in decode]
        reading = [asyncio.create_task(_all_of(cluster.call(60.0))) for _ in range(4 * WORKERS)]
        for group, opened in ((prefill, gates[:WORKERS]), (decode, gates[WORKERS:])):
            await cluster.until(lambda group=group: sum(len(worker.attempts) for worker in group) == 4 * WORKERS)
            assert sum(bool(worker.attempts) for worker in group) > WORKERS / 2, "the work is spread"
            for gate in opened:
                gate.set()
        for events in await asyncio.gather(*reading):
            assert ids_of(events) == [*range(10, 14), EOS]
        await cluster.idle()


async def _all_of(call: AsyncIterable[gen.GenerateResponse]) -> list[gen.GenerateResponse]:
    return [event async for event in call]


async def test_a_router_has_the_same_sockets_whatever_streams_there_are() -> None:
    async with crowd(2, 2, lambda spec: [*range(10, 14), EOS]) as cluster:
        found = []
        for streams in (2, 100):
            for worker in cluster.workers.values():
                worker.gate("step 2")
                worker.reached["step 2"].clear()
            calls = [cluster.call(request_id=f"{streams}/{index}") for index in range(streams)]
            for call in calls:
                while not (await call.read()).HasField("tokens"):
                    pass
            found.append(len(psutil.Process().net_connections(kind="all")))
            for worker in cluster.workers.values():
                worker.gates["step 2"].set()
            for call in calls:
                while (event := await call.read()) and not event.HasField("finished"):
                    pass
            await cluster.idle()
        assert found[0] == found[1]
