"""A session delivers every frame once and in order, however its streams break."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.errors import ResourceExhausted, TransferError
from baton.rpc import link
from baton.rpc.link import Session
from baton.v1 import worker_pb2 as wire
from tests.rpc.waiting import until

SMALL_FRAGMENT = 64


class RouterSide(Session[wire.RouterFrame, wire.WorkerFrame]):
    def take(self) -> wire.RouterFrame | None:
        """What `outgoing` would yield next, without waiting."""
        return self._take()


class WorkerSide(Session[wire.WorkerFrame, wire.RouterFrame]):
    def take(self) -> wire.WorkerFrame | None:
        return self._take()


def command(number: int, size: int = 0) -> wire.RouterFrame:
    return wire.RouterFrame(cancel=wire.CancelCommand(attempt=str(number).encode(), reason="x" * size))


def answer(number: int, size: int = 0) -> wire.WorkerFrame:
    return wire.WorkerFrame(ended=wire.Ended(attempt=str(number).encode(), message="x" * size))


def router_side(on_frame: Callable[[wire.WorkerFrame], None] = lambda _frame: None) -> RouterSide:
    return RouterSide(wire.RouterFrame, wire.WorkerFrame, "router side", on_frame)


def worker_side(on_frame: Callable[[wire.RouterFrame], None] = lambda _frame: None) -> WorkerSide:
    return WorkerSide(wire.WorkerFrame, wire.RouterFrame, "worker side", on_frame)


class World:
    """Two sessions and the frames that are on the way between them."""

    def __init__(self) -> None:
        self.at_worker: list[int] = []
        self.at_router: list[int] = []
        self.router = router_side(lambda frame: self.at_router.append(int(frame.ended.attempt)))
        self.worker = worker_side(lambda frame: self.at_worker.append(int(frame.cancel.attempt)))
        self.sent: dict[str, list[tuple[int, bool]]] = {"router": [], "worker": []}
        self.down: list[bytes] = []
        self.up: list[bytes] = []
        self.resume()

    def send(self, side: str, big: bool) -> None:
        number, size = len(self.sent[side]), 500 if big else 0
        self.sent[side].append((number, big))
        if side == "router":
            self.router.send(command(number, size))
        else:
            self.worker.send(answer(number, size))

    def write(self, side: str, count: int) -> bool:
        """Puts frames on the way, as bytes: what is kept may change afterwards."""
        source, way = (self.router, self.down) if side == "router" else (self.worker, self.up)
        wrote = False
        for _ in range(count):
            if (frame := source.take()) is not None:
                way.append(frame.SerializeToString())
                wrote = True
        return wrote

    def read(self, side: str, count: int) -> None:
        for _ in range(count):
            if side == "worker" and self.down:
                self.worker.receive(wire.RouterFrame.FromString(self.down.pop(0)))
            elif side == "router" and self.up:
                self.router.receive(wire.WorkerFrame.FromString(self.up.pop(0)))

    def heartbeat(self, side: str) -> None:
        if side == "router":
            self.down.append(self.router.heartbeat().SerializeToString())
        else:
            self.up.append(self.worker.heartbeat().SerializeToString())

    def resume(self) -> None:
        """What is on the way is lost; both sides learn what the other has."""
        self.down.clear()
        self.up.clear()
        self.router.detach()
        self.worker.attach(self.router.received)
        self.router.attach(self.worker.received)

    def settle(self) -> None:
        self.resume()
        while self.write("router", 1000) | self.write("worker", 1000):
            self.read("worker", 1000)
            self.read("router", 1000)
        self.heartbeat("router")
        self.heartbeat("worker")
        self.read("worker", 1)
        self.read("router", 1)

    def check(self) -> None:
        for side, delivered in (("router", self.at_worker), ("worker", self.at_router)):
            for lane in (False, True):
                sent = [number for number, big in self.sent[side] if big is lane]
                assert [number for number in delivered if self.sent[side][number][1] is lane] == sent
        assert self.router.pending == self.worker.pending == 0


SIDES = st.sampled_from(["router", "worker"])
COUNTS = st.integers(1, 12)
ACTS = st.one_of(
    st.tuples(st.just("send"), SIDES, st.booleans()),
    st.tuples(st.just("write"), SIDES, COUNTS),
    st.tuples(st.just("read"), SIDES, COUNTS),
    st.tuples(st.just("heartbeat"), SIDES),
    st.tuples(st.just("resume")),
)


@given(st.lists(ACTS, max_size=60))
def test_each_frame_once_and_in_order_however_the_stream_breaks(acts: list[tuple[object, ...]]) -> None:
    with mock.patch("baton.rpc.lanes.FRAGMENT_BYTES", SMALL_FRAGMENT):
        world = World()
        for act, *arguments in acts:
            getattr(world, str(act))(*arguments)
        world.settle()
        world.check()


def take_all(session: RouterSide) -> list[wire.RouterFrame]:
    frames = []
    while (frame := session.take()) is not None:
        frames.append(wire.RouterFrame.FromString(frame.SerializeToString()))
    return frames


def test_control_overtakes_fragments() -> None:
    router = router_side()
    router.attach(0)
    router.send(command(1, 300_000))
    first = router.take()
    assert first is not None
    assert first.WhichOneof("body") == "fragment"
    router.send(command(2))
    kinds = [frame.WhichOneof("body") for frame in take_all(router)]
    assert kinds[0] == "cancel"
    assert kinds[1:] == ["fragment"] * 4


def test_a_gap_breaks_the_stream_and_a_duplicate_does_not() -> None:
    seen: list[bytes] = []
    worker = worker_side(lambda frame: seen.append(frame.cancel.attempt))
    router = router_side()
    router.attach(0)
    for number in range(4):
        router.send(command(number))
    frames = take_all(router)
    worker.receive(frames[0])
    worker.receive(frames[0])
    worker.receive(frames[1])
    worker.receive(frames[0])
    with pytest.raises(TransferError, match="frame 4 came after 2"):
        worker.receive(frames[3])
    worker.receive(frames[2])
    worker.receive(frames[3])
    assert seen == [b"0", b"1", b"2", b"3"]


def test_too_many_frames_without_an_acknowledgement_end_the_session(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "UNACKNOWLEDGED_LIMIT", 10)
    router = router_side()
    router.attach(0)
    for number in range(10):
        router.send(command(number))
    take_all(router)
    with pytest.raises(ResourceExhausted, match="10 frames are not acknowledged"):
        router.send(command(11))
    router.receive(wire.WorkerFrame(acknowledged=4, heartbeat=wire.Heartbeat()))
    assert router.pending == 6
    router.send(command(11))


def test_after_close_nothing_is_kept_sent_or_taken() -> None:
    seen: list[object] = []
    router = router_side(seen.append)
    router.attach(0)
    router.send(command(1))
    router.close()
    router.close()
    router.send(command(2))
    router.receive(wire.WorkerFrame(number=1, freed=wire.Freed()))
    assert router.pending == 0
    assert take_all(router) == []
    assert seen == []


def test_what_the_peer_has_already_is_not_sent_again() -> None:
    router = router_side()
    router.attach(0)
    for number in range(5):
        router.send(command(number))
    take_all(router)
    router.send(command(5))
    router.attach(3)
    assert [frame.number for frame in take_all(router)] == [4, 5, 6]


class Reader:
    """Collects what a session writes to one stream."""

    def __init__(self, session: RouterSide, stream: int | None = None) -> None:
        self.frames: list[wire.RouterFrame] = []
        self._session, self._stream = session, stream
        self.task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        async for frame in self._session.outgoing(self._stream):
            self.frames.append(frame)


async def test_heartbeats_go_out_when_there_is_nothing_to_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "HEARTBEAT_S", 0.01)
    router = router_side()
    router.receive(wire.WorkerFrame(number=1, freed=wire.Freed()))
    reader = Reader(router, router.attach(0))
    await until(lambda: len(reader.frames) >= 3, "heartbeats")
    assert {(f.number, f.acknowledged, f.WhichOneof("body")) for f in reader.frames} == {(0, 1, "heartbeat")}
    router.close()
    await reader.task


async def test_an_acknowledgement_goes_out_early_when_much_came(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "HEARTBEAT_S", 1000.0)
    router = router_side()
    reader = Reader(router, router.attach(0))
    await asyncio.sleep(0)
    for number in range(1, link.ACK_EVERY + 1):
        router.receive(wire.WorkerFrame(number=number, freed=wire.Freed()))
    await until(lambda: reader.frames, "the acknowledgement")
    assert [frame.acknowledged for frame in reader.frames] == [link.ACK_EVERY]
    router.close()
    await reader.task


async def test_a_stream_ends_when_it_is_detached_or_replaced() -> None:
    router = router_side()
    former = router.attach(0)
    first = Reader(router, former)
    await asyncio.sleep(0)
    stream = router.attach(0)
    second = Reader(router, stream)
    await first.task
    router.detach(former)  # late news of the former stream
    router.send(command(1))
    await until(lambda: second.frames, "the frame on the new stream")
    router.detach(stream)
    await second.task
    assert first.frames == []


async def test_a_stream_that_was_replaced_before_it_wrote_takes_no_frame() -> None:
    router = router_side()
    former = router.attach(0)
    router.send(command(1))
    stream = router.attach(0)
    first, second = Reader(router, former), Reader(router, stream)
    await first.task
    await until(lambda: second.frames, "the frame")
    assert first.frames == []
    router.close()
    await second.task


async def test_a_silent_peer_is_a_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "SILENCE_S", 0.02)

    async def silent() -> object:
        await asyncio.Event().wait()
        yield wire.WorkerFrame()

    with pytest.raises(TimeoutError):
        await link.read_frames(router_side(), silent(), 0.02, lambda _: None)  # type: ignore[arg-type]
