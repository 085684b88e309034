"""The router's start, readiness and end."""

from __future__ import annotations

import asyncio
import socket

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from baton.config import PathChoice, RouterConfig
from baton.errors import ConfigError, Unavailable
from baton.rpc import net
from baton.v1 import generation_pb2 as gen
from baton.v1.admin_pb2 import ListWorkersRequest
from router.app import Router, run
from router.workers import link as worker_link
from tests.router.conftest import Cluster, error_of, ids_of
from tests.router.doubles import WAIT_S, WorkerDouble
from tests.router.tiny_model import card


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


async def degraded(cluster: Cluster) -> list[str]:
    """The same from both calls that tell of it."""
    listed = await cluster.admin.ListWorkers(ListWorkersRequest(), timeout=WAIT_S)
    assert list((await cluster.status()).degraded) == list(listed.degraded)
    return list(listed.degraded)


@pytest.mark.parametrize(
    ("path", "alone", "lacks"),
    [
        ("adaptive", True, "prompts are computed in place, on decode workers"),
        ("disaggregated", False, "all requests are refused: the path setting (disaggregated) forbids "),
        ("direct", True, ""),
    ],
)
async def test_decode_workers_alone_serve_where_the_path_allows_it(path: PathChoice, alone: bool, lacks: str) -> None:
    router = Router(RouterConfig(listen="127.0.0.1:0", name="router", path=path))
    await router.start()
    async with net.open_channel(router.process.address) as channel:
        cluster = Cluster(router, channel)
        await cluster.add("d0", "decode")
        assert router.ready == alone
        found = await degraded(cluster)
        assert len(found) == bool(lacks)
        assert all(line.startswith(f"tiny: no prefill worker; {lacks}") for line in found)
        if not alone:
            error = await error_of(cluster.call())
            assert isinstance(error, Unavailable)
            assert (error.constraint, error.retry_after_s) == ("prefill_workers", 1.0)
        await cluster.add("p0", "prefill")
        assert router.ready
        assert not await degraded(cluster)
        await cluster.decode.stop()
        await cluster.until(lambda: not router.ready)
        (line,) = await degraded(cluster)
        assert line.startswith("tiny: no decode worker; ")
        await router.stop()
        await cluster.prefill.stop()


async def test_without_decode_workers_one_token_is_served(empty: Cluster) -> None:
    await empty.add("p0", "prefill")
    (event, *_, last) = await empty.generate(stopping=gen.Stopping(max_tokens=1))
    assert event.HasField("accepted")
    assert last.finished.timeline.path == gen.PATH_PREFILL_ONLY
    error = await error_of(empty.call(stopping=gen.Stopping(max_tokens=2)))
    assert isinstance(error, Unavailable)
    assert (error.constraint, error.retry_after_s) == ("decode_workers", 1.0)


async def test_a_model_that_lacks_a_pool_is_named_and_the_other_is_served(cluster: Cluster) -> None:
    named = card(name="other")
    await cluster.add("p1", "prefill", card=named)
    assert await degraded(cluster) == ["other: no decode worker; only requests for a single token are served"]
    assert cluster.router.ready
    assert ids_of(await cluster.generate(model="tiny")) == cluster.answer
    error = await error_of(cluster.call(model="other"))
    assert isinstance(error, Unavailable)
    assert "no decode worker of other" in str(error)
    await cluster.add("d1", "decode", card=named)
    assert not await degraded(cluster)


@pytest.mark.parametrize("name", ["p0", "d0"])
async def test_a_broken_stream_is_no_empty_pool(cluster: Cluster, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_link, "RETRY_S", 0.3)
    cluster.workers[name].break_stream()
    await cluster.until(lambda: not cluster.usable(name))
    call = cluster.call()
    assert not await degraded(cluster)
    assert cluster.router.ready
    assert await health(cluster, "readiness") == 1
    assert not cluster.usable(name)
    assert ids_of([event async for event in call]) == cluster.answer
    assert cluster.workers[name].greetings == [False, True]


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
