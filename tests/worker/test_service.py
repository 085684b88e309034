"""A router's session on a worker: it outlives its streams, and is lost only for good."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from baton import errors
from baton.messages import Freed
from baton.rpc import lanes
from baton.rpc.status import from_rpc_error
from baton.spec import ProcessRef
from baton.v1 import worker_pb2 as wire
from baton.worker import service as worker_service
from tests.rpc.waiting import until
from tests.worker.attached import Bench, cancel, freed, rest


async def test_hello_comes_first(bench: Bench) -> None:
    call, hello = await bench.attach()
    assert (hello.process.incarnation, hello.session, hello.received, hello.resumed) == ("w-1", "s-1", 0, False)
    assert not bench.worker.attached.is_set(), "the router may not have read the hello yet"
    await call.write(wire.RouterFrame(heartbeat=wire.Heartbeat()))
    await until(bench.worker.attached.is_set, "the router's first frame")
    assert bench.worker.session(ProcessRef("r", "r-1", "")) is bench.session
    assert bench.worker.session(ProcessRef("r", "r-2", "")) is None
    call.cancel()


@pytest.mark.parametrize(
    "first",
    [
        wire.RouterFrame(cancel=wire.CancelCommand()),
        wire.RouterFrame(hello=wire.Hello(session="s")),
        wire.RouterFrame(hello=wire.Hello(process=wire.ProcessId(incarnation="r"))),
    ],
)
async def test_anything_else_is_refused(bench: Bench, first: wire.RouterFrame) -> None:
    call: Any = bench.stub.Attach()
    await call.write(first)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    error = from_rpc_error(caught.value)
    assert isinstance(error, errors.InvalidArgument)
    assert error.field == "hello"
    assert bench.worker.sessions == []


async def test_a_stream_without_a_word_is_refused(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_service, "SILENCE_S", 0.05)
    call: Any = bench.stub.Attach()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_commands_arrive_and_frames_leave(bench: Bench) -> None:
    call, _ = await bench.attach()
    for number in (1, 2, 3):
        await call.write(cancel(number))
    await until(lambda: len(bench.handler.commands) == 3)
    bench.session.send(Freed(b"1"))
    frame = await freed(call)
    assert (frame.number, frame.acknowledged, frame.freed.attempt) == (1, 3, b"1")
    call.cancel()


async def test_a_broken_stream_is_taken_up_again(bench: Bench) -> None:
    call, _ = await bench.attach()
    await call.write(cancel(1))
    await until(lambda: bench.handler.commands)
    call.cancel()
    await until(lambda: bench.session.streams == 0, "the break is noticed")
    bench.session.send(Freed(b"kept"))
    call, hello = await bench.attach()
    assert (hello.resumed, hello.received) == (True, 1)
    await call.write(cancel(1))  # sent again: it may not have arrived
    await call.write(cancel(2))
    assert (await freed(call)).freed.attempt == b"kept"
    await until(lambda: bench.handler.commands == ["1", "2"])
    assert bench.handler.lost == []
    call.cancel()


async def test_a_second_stream_takes_over(bench: Bench) -> None:
    """Again and again: the end of the former must not end the new one."""
    call, _ = await bench.attach()
    for round_ in range(20):
        former, (call, hello) = call, await bench.attach(received=round_)
        assert hello.resumed
        bench.session.send(Freed(b"new"))
        assert (await freed(call)).number == round_ + 1
        assert await rest(former) == []
        await until(lambda: bench.session.streams == 1, "the former is gone")
        await call.write(cancel(round_ + 1))
        await until(lambda count=round_ + 1: len(bench.handler.commands) == count)  # type: ignore[misc]
    assert bench.handler.lost == []
    call.cancel()


async def test_a_stream_that_breaks_at_its_hello_is_noticed(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The router is gone before the answer is written: the session must not live for ever."""
    monkeypatch.setattr(worker_service, "GRACE_S", 0.05)

    async def hello() -> AsyncIterator[wire.RouterFrame]:
        process = wire.ProcessId(name="r", incarnation="r-1", address="here")
        yield wire.RouterFrame(hello=wire.Hello(process=process, session="s"))
        await asyncio.Event().wait()

    stream = bench.worker.Attach(hello(), None)
    await anext(stream)
    await stream.aclose()  # type: ignore[attr-defined]
    await until(lambda: bench.handler.lost == ["r-1"])
    assert bench.worker.sessions == []


async def test_the_grace_time_ends(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_service, "GRACE_S", 0.05)
    call, _ = await bench.attach()
    call.cancel()
    await until(lambda: bench.handler.lost == ["r-1"])
    assert bench.worker.sessions == []
    assert not bench.worker.attached.is_set()
    call, hello = await bench.attach()
    assert not hello.resumed
    call.cancel()


async def test_a_silent_router_is_broken_off(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_service, "GRACE_S", 0.05)
    monkeypatch.setattr(bench.worker, "_hold_s", 0.05)
    call, _ = await bench.attach()
    await until(lambda: bench.handler.lost == ["r-1"])
    assert await rest(call) == []


async def test_a_new_incarnation_loses_the_old_one(bench: Bench) -> None:
    old, _ = await bench.attach("r-1", "s-1")
    new, hello = await bench.attach("r-2", "s-2")
    assert bench.handler.lost == ["r-1"]
    assert not hello.resumed
    assert await rest(old) == []
    assert bench.session.router.incarnation == "r-2"
    new.cancel()


async def test_a_new_session_loses_the_old_one_and_its_frames(bench: Bench) -> None:
    old, _ = await bench.attach("r-1", "s-1")
    former = bench.session
    new, hello = await bench.attach("r-1", "s-2")
    assert bench.handler.lost == ["r-1"]
    assert not hello.resumed
    former.link.receive(cancel(1))  # was on the way
    former.send(Freed(b""))
    assert bench.handler.commands == []
    await new.write(cancel(1))
    await until(lambda: bench.handler.commands == ["1"])
    old.cancel()
    new.cancel()


async def test_two_routers(bench: Bench) -> None:
    one, _ = await bench.attach()
    two: Any = bench.stub.Attach()
    process = wire.ProcessId(name="q", incarnation="q-1")
    await two.write(wire.RouterFrame(hello=wire.Hello(process=process, session="s")))
    await two.read()
    assert len(bench.worker.sessions) == 2
    one.cancel()
    two.cancel()


@pytest.mark.parametrize("data", [b"x" * 200_000, b"small"])
async def test_artifacts(bench: Bench, data: bytes) -> None:
    request = wire.FetchArtifactRequest(sha256=hashlib.sha256(data).hexdigest())
    pieces = [piece.data async for piece in bench.stub.FetchArtifact(request)]
    assert b"".join(pieces) == data
    assert max(map(len, pieces)) <= lanes.FRAGMENT_BYTES


async def test_an_unknown_artifact(bench: Bench) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        _ = [piece async for piece in bench.stub.FetchArtifact(wire.FetchArtifactRequest(sha256="f" * 64))]
    assert isinstance(from_rpc_error(caught.value), errors.NotFound)


@pytest.mark.parametrize("sha256", ["", "ff", "g" * 64, "f" * 65, "f" * 9_000, "\x00" * 64, "😀" * 250_000])
async def test_an_artifact_that_is_no_digest(bench: Bench, sha256: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        _ = [piece async for piece in bench.stub.FetchArtifact(wire.FetchArtifactRequest(sha256=sha256))]
    error = from_rpc_error(caught.value)
    assert isinstance(error, errors.InvalidArgument)
    assert error.field == "sha256"
