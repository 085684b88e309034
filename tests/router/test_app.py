"""The router's start, readiness and end."""

from __future__ import annotations

import asyncio
import socket

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from baton.config import RouterConfig
from baton.errors import ConfigError
from baton.rpc import net
from router.app import run
from tests.router.conftest import Cluster
from tests.router.doubles import WAIT_S, WorkerDouble


async def health(cluster: Cluster, name: str) -> int:
    request = health_pb2.HealthCheckRequest(service=name)
    answer = await health_pb2_grpc.HealthStub(cluster.channel).Check(request, timeout=WAIT_S)
    return int(answer.status)


async def test_alive_at_once_and_ready_with_both_roles(empty: Cluster) -> None:
    async def ready() -> bool:
        return await health(empty, "readiness") == 1

    async def becomes(wanted: bool) -> None:
        async with asyncio.timeout(WAIT_S):
            while await ready() != wanted:
                continue

    assert await health(empty, "liveness") == 1
    await empty.add("p0", "prefill")
    assert not await ready()
    await empty.add("d0", "decode")
    await becomes(True)
    assert await health(empty, "baton.v1.Generation") == 1
    await empty.decode.stop()
    await becomes(False)


async def test_run_serves_until_told_to_stop_and_frees_everything() -> None:
    stop, address = asyncio.Event(), asyncio.get_running_loop().create_future()
    running = asyncio.create_task(run(RouterConfig(listen="127.0.0.1:0"), on_ready=address.set_result, stop=stop))
    where = await address
    worker = WorkerDouble("p0", "prefill", lambda spec: [5])
    await worker.start()
    await worker.join(where)
    stop.set()
    async with asyncio.timeout(WAIT_S):
        await running
    assert not await net.listens(where)
    await worker.stop()


async def test_a_stopping_router_ends_streams_and_the_workers_free(cluster: Cluster) -> None:
    cluster.decode.gate("step 1")
    stream = cluster.call()
    await cluster.decode.at("step 1")
    stopping = asyncio.create_task(cluster.router.stop())
    with pytest.raises(grpc.aio.AioRpcError, match="shutting down") as caught:
        async for _ in stream:
            pass
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    await stopping
    assert cluster.decode.cancelled == cluster.decode.attempts
    assert not any(cluster.router.requests.live().values())


async def test_an_occupied_port_is_one_clear_line() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ConfigError, match=f"cannot listen on {address}") as caught:
            await run(RouterConfig(listen=address), on_ready=lambda _: None, stop=asyncio.Event())
    assert "\n" not in str(caught.value)
