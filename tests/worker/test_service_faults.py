"""A router that does not acknowledge, pieces that are no frame, commands that fail: the service goes on."""

from __future__ import annotations

import pytest

from baton.messages import Freed
from baton.rpc import lanes, link
from baton.v1 import worker_pb2 as wire
from tests.rpc.waiting import until
from tests.worker.attached import Bench, cancel, rest


async def test_a_router_that_does_not_acknowledge_is_given_up(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no sender to it ever fails."""
    monkeypatch.setattr(link, "UNACKNOWLEDGED_LIMIT", 50)
    call, _ = await bench.attach()
    session = bench.session
    for number in range(200):
        session.send(Freed(str(number).encode()))
    await until(lambda: bench.handler.lost == ["r-1"])
    assert bench.worker.sessions == []
    call, hello = await bench.attach()
    assert not hello.resumed
    call.cancel()


async def test_pieces_without_end(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes, "ASSEMBLY_LIMIT_BYTES", 1000)
    call, _ = await bench.attach()
    await call.write(wire.RouterFrame(number=1, fragment=wire.Fragment(message_id=1, data=b"x" * 2000)))
    await until(lambda: bench.handler.lost == ["r-1"])
    assert bench.worker.sessions == []
    call.cancel()


async def test_pieces_that_make_no_frame(bench: Bench) -> None:
    """A command is lost with them: the session can't go on, and the service does."""
    call, _ = await bench.attach()
    await call.write(wire.RouterFrame(number=1, fragment=wire.Fragment(message_id=1, data=b"\xff", last=True)))
    await until(lambda: bench.handler.lost == ["r-1"])
    assert bench.worker.sessions == []
    assert await rest(call) == []
    call, hello = await bench.attach()
    assert not hello.resumed
    call.cancel()


async def test_a_command_that_fails_fails_alone(bench: Bench) -> None:
    def fail() -> None:
        bench.handler.on_cancel = lambda: None
        raise KeyError("a fault of ours")

    bench.handler.on_cancel = fail
    call, _ = await bench.attach()
    await call.write(cancel(1))
    await call.write(cancel(2))
    await until(lambda: bench.handler.commands == ["2"])
    assert bench.session.streams == 1
    call.cancel()
