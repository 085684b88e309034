"""Ends that nobody hoped for: cancels, deadlines, limits, slow clients, a router that stops."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from baton.config import RouterConfig
from baton.errors import DeadlineExceeded, ResourceExhausted, Unavailable
from baton.rpc.status import from_rpc_error
from baton.v1 import generation_pb2 as gen
from baton.v1 import worker_pb2 as wire
from tests.router.conftest import Cluster, error_of, ids_of
from tests.router.doubles import WAIT_S
from tests.router.tiny_model import EOS, encode

# Cancel.


@pytest.mark.parametrize(
    ("worker", "point", "named"),
    [
        ("p0", "queued", {"p0"}),
        ("p0", "started", {"p0", "d0"}),
        ("p0", "bound", {"p0", "d0"}),
        ("d0", "received", {"p0", "d0"}),
        ("d0", "step 2", {"d0"}),
    ],
)
async def test_a_cancel_reaches_every_worker_that_may_hold_something(
    cluster: Cluster, worker: str, point: str, named: set[str]
) -> None:
    cluster.workers[worker].gate(point)
    call = cluster.call()
    await call.read()
    await cluster.workers[worker].at(point)
    await asyncio.sleep(0.05)  # lets what was sent before arrive
    call.cancel()
    attempt = cluster.prefill.attempts[0]
    await cluster.idle()
    told = {name for name, double in cluster.workers.items() if attempt in double.cancelled}
    assert told >= named
    assert cluster.counted("requests_cancelled") == 1


async def test_a_deadline_cancels_too(cluster: Cluster) -> None:
    cluster.decode.gate("step 1")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in cluster.call(timeout=0.3):
            pass
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await cluster.idle()
    assert cluster.decode.cancelled == cluster.decode.attempts


class TestLimit:
    @pytest.fixture
    def config(self) -> RouterConfig:
        return RouterConfig(listen="127.0.0.1:0", request_limit_s=0.2, max_requests=2)

    async def test_a_request_without_deadline_has_the_routers(self, cluster: Cluster) -> None:
        cluster.prefill.gate("queued")
        call = cluster.generation.Generate(gen.GenerateRequest(prompt="hello"))
        error = await error_of(call)
        assert "deadline" in str(error)
        await cluster.idle()

    async def test_more_requests_than_places_are_refused(self, cluster: Cluster) -> None:
        gate = cluster.prefill.gate("queued")
        calls = [cluster.call() for _ in range(2)]
        for call in calls:
            await call.read()
        error = await error_of(cluster.call())
        assert isinstance(error, ResourceExhausted)
        assert error.constraint == "max_requests"
        assert error.retry_after_s
        gate.set()
        for call in calls:
            while await call.read() is not grpc.aio.EOF:
                pass


async def test_a_label_is_taken_while_it_is_live(cluster: Cluster) -> None:
    gate = cluster.prefill.gate("queued")
    first = cluster.call(request_id="one")
    await first.read()
    error = await error_of(cluster.call(request_id="one"))
    assert "request_id" in str(error)
    other = cluster.call(request_id="one", tenant_salt="another tenant")
    assert (await other.read()).HasField("accepted")
    gate.set()
    for call in (first, other):
        while await call.read() is not grpc.aio.EOF:
            pass
    assert ids_of(await cluster.generate(request_id="one")) == cluster.answer


# Slow clients.


class TestSlowClient:
    @pytest.fixture
    def config(self) -> RouterConfig:
        return RouterConfig(listen="127.0.0.1:0", client_buffer_tokens=2_000)

    async def test_a_client_that_never_reads_is_given_up_with_a_named_error(self, cluster: Cluster) -> None:
        letter = encode("a")[0]
        cluster.answer = [letter] * 10 + [EOS]
        hold = cluster.decode.gate("step 5")
        call = cluster.call(logprobs=20)
        await call.read()
        await cluster.decode.at("step 5")
        other = cluster.call()
        await cluster.until(lambda: len(cluster.decode.attempts) == 2)
        bulky = gen.TokenLogprobs(logprob=-1.0, top=[gen.Alternative(id=300 + i, logprob=-1.0) for i in range(20)])
        attempt, position = cluster.prefill.attempts[0], len(encode("hello world")) + 5
        while cluster.counted("slow_clients") == 0:
            assert position < 60_000, "the client's side swallows everything"
            run = wire.TokenRun(attempt=attempt, position=position, ids=[letter] * 50, logprobs=[bulky] * 50)
            cluster.decode.says(tokens=wire.TokenFrame(runs=[run]))
            position += 50
            await asyncio.sleep(0.001)
        await cluster.until(lambda: cluster.router.requests.live()["requests"] == 1)  # though it has read nothing
        hold.set()
        assert ids_of([event async for event in other]) == cluster.answer
        error = None
        async with asyncio.timeout(WAIT_S):
            try:
                while await call.read() is not grpc.aio.EOF:
                    pass
            except grpc.aio.AioRpcError as caught:
                error = from_rpc_error(caught)
        assert isinstance(error, ResourceExhausted)
        assert error.constraint == "client_buffer"
        await cluster.idle()


# The end of the router.


async def test_a_router_that_stops_ends_streams_and_tells_workers(cluster: Cluster) -> None:
    cluster.decode.gate("step 1")
    call = cluster.call()
    await cluster.decode.at("step 1")
    cluster.router.requests.refuse_all(Unavailable("the router is shutting down", 1.0))
    error = await error_of(call)
    assert isinstance(error, Unavailable)
    refusal = await error_of(cluster.call())
    assert "shutting down" in str(refusal)
    await cluster.until(lambda: cluster.decode.cancelled == cluster.decode.attempts)


@pytest.mark.parametrize("timeout", [1e-9, 0.001, 0.002, 0.003])
async def test_a_deadline_that_passes_at_the_first_message_is_no_fault(
    cluster: Cluster, timeout: float, caplog: pytest.LogCaptureFixture
) -> None:
    cluster.prefill.gate("queued")
    for _ in range(25):
        assert isinstance(await error_of(cluster.call(timeout=timeout)), DeadlineExceeded)
    await cluster.idle()
    assert not [record.getMessage() for record in caplog.records if record.levelname in ("ERROR", "CRITICAL")]
