"""Which transport a pair takes: the best one that connects, and what it says of those that did not."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import pytest
from structlog.testing import capture_logs

from baton.errors import DeadlineExceeded, Mismatch, PeerClosed
from baton.rpc.net import service
from baton.spec import ProcessRef, RefusalReason
from baton.v1 import transfer_pb2 as wire
from baton.v1.transfer_pb2_grpc import TransferServicer, add_TransferServicer_to_server
from baton.worker.handshake import handshake_of
from baton.worker.sending import pair as module
from baton.worker.sending.connecting import WHY_CHARS
from baton.worker.sending.pair import PairStream
from kvtransfer.blocks.memory import PoolMemory
from kvtransfer.transports.base import Channel, Writer
from kvtransfer.transports.shm.receiver import ShmReceiver
from kvtransfer.transports.shm.writer import ShmWriter
from kvtransfer.transports.tcp.receiver import TcpReceiver
from kvtransfer.transports.tcp.writer import TcpWriter
from tests.kvtransfer.transports.harness import LAYOUT, Recorder
from tests.rpc.servers import start_server
from tests.rpc.waiting import until
from tests.worker.sending.test_mover import ScriptedChannel


class Answering(TransferServicer):
    """Answers each handshake with these endpoints, and renews the lease."""

    def __init__(self, endpoints: Sequence[tuple[str, str]], lease_s: float) -> None:
        self.endpoints, self.lease_ms = endpoints, int(lease_s * 1e3)
        self.handshakes = self.renewals = 0
        self.broken = asyncio.Event()

    async def Handoff(self, request_iterator: AsyncIterator[wire.SenderFrame], context: Any) -> AsyncIterator[Any]:
        async for frame in request_iterator:
            if frame.WhichOneof("body") == "handshake":
                self.handshakes += 1
                answer = wire.HandshakeResponse(process=wire.HandshakeResponse().process, lease_ms=self.lease_ms)
                answer.process.incarnation = "d-1"
                answer.endpoints.extend(wire.Endpoint(transport=kind, address=at) for kind, at in self.endpoints)
                yield wire.ReceiverFrame(handshake=answer)
            elif frame.WhichOneof("body") == "renew":
                self.renewals += 1
                yield wire.ReceiverFrame(renewed=wire.RenewResponseFrame(lease_ms=self.lease_ms))
            if self.broken.is_set():
                self.broken.clear()
                return


class Told:
    """A `PairEvents` that remembers."""

    has_business = False

    def __init__(self) -> None:
        self.ups = 0
        self.downs: list[tuple[RefusalReason, str]] = []
        self.channels: list[Channel] = []

    def stream_up(self) -> None:
        self.ups += 1

    def stream_down(self, reason: RefusalReason, message: str) -> None:
        self.downs.append((reason, message))

    def take(self, frame: wire.ReceiverFrame) -> None: ...

    async def move(self, channel: Channel) -> None:
        self.channels.append(channel)
        await asyncio.Event().wait()


class ScriptedWriter(Writer):
    """Raises what it is told to, or connects; None stands for a black hole."""

    kind = "scripted"

    def __init__(self, *outcomes: Exception | str | None) -> None:
        self.outcomes = list(outcomes)
        self.tried: list[tuple[str, float]] = []
        self.channel = ScriptedChannel()

    def connect(self, endpoint: str, peer: ProcessRef, deadline: float) -> Channel:
        seconds = deadline - time.monotonic()
        self.tried.append((endpoint, seconds))
        outcome = self.outcomes.pop(0) if self.outcomes else "works"
        if isinstance(outcome, Exception):
            raise outcome
        if outcome is None:
            threading.Event().wait(seconds)
            raise DeadlineExceeded(f"{peer.name} did not answer at {endpoint}")
        return self.channel


REFUSED = PeerClosed("d0 refused the connection")


class Bench:
    """A pair's stream to a real server."""

    def __init__(self, stream: PairStream, told: Told, answering: Answering) -> None:
        self.stream, self.told, self.answering = stream, told, answering

    async def up(self) -> str:
        """The transport, once it is up."""
        self.stream.want()
        await until(lambda: self.stream.up, f"the stream up: {self.told.downs}")
        return self.stream.transport

    async def down(self) -> tuple[RefusalReason, str]:
        """Why it did not come up."""
        self.stream.want()
        await until(lambda: self.told.downs, "the stream down")
        return self.told.downs[0]


@asynccontextmanager
async def bench(
    writers: dict[str, Writer], endpoints: Sequence[tuple[str, str]] | None = None, lease_s: float = 30.0
) -> AsyncIterator[Bench]:
    """Without `endpoints` every writer has one, in their order."""
    answering = Answering(endpoints or [(kind, f"at-{kind}") for kind in writers], lease_s)
    server = await start_server("127.0.0.1:0", [service(add_TransferServicer_to_server, answering, "Transfer")])
    told, peer = Told(), ProcessRef("d0", "d-1", server.address)
    with ThreadPoolExecutor(4) as executor:
        handshake = handshake_of(ProcessRef("p0", "p-1", ""), "f", LAYOUT, writers)
        stream = PairStream(peer, handshake, writers, told, executor)
        try:
            yield Bench(stream, told, answering)
        finally:
            await stream.stop()
            await server.stop(0)


async def test_the_best_that_connects_is_taken_and_no_other_is_tried() -> None:
    first, second = ScriptedWriter(), ScriptedWriter()
    with capture_logs() as logs:
        async with bench({"shm": first, "tcp": second}) as b:
            assert await b.up() == "shm"
            assert b.stream.note == ""
            await until(lambda: b.told.channels, "the moves")
            assert b.told.channels == [first.channel]
            assert second.tried == []
    (line,) = (log for log in logs if log["event"] == "control stream up")
    assert (line["log_level"], line["transport"]) == ("info", "shm")


async def test_what_does_not_connect_gives_way_to_the_next_and_is_named() -> None:
    first, second = ScriptedWriter(REFUSED), ScriptedWriter()
    with capture_logs() as logs:
        async with bench({"shm": first, "tcp": second}) as b:
            assert await b.up() == "tcp"
            assert b.stream.note == "shm: d0 refused the connection"
            await until(lambda: b.told.channels, "the moves")
            assert b.told.channels == [second.channel]
    (line,) = (log for log in logs if log["event"] == "control stream up")
    expected = ("warning", "tcp", "shm: d0 refused the connection")
    assert (line["log_level"], line["transport"], line["not_used"]) == expected


async def test_an_endpoint_without_an_answer_leaves_time_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CONNECT_S", 0.6)
    first, second, third = ScriptedWriter(None), ScriptedWriter(REFUSED), ScriptedWriter()
    async with bench({"nixl": first, "shm": second, "tcp": third}) as b:
        assert await b.up() == "tcp"
        assert b.stream.note == "nixl: d0 did not answer at at-nixl; shm: d0 refused the connection"
        (_, nixl), (_, shm), (_, tcp) = (*first.tried, *second.tried, *third.tried)
        assert nixl <= 0.2
        assert shm <= 0.3
        assert 0 < tcp <= 0.4


async def test_connecting_leaves_enough_of_a_short_lease_to_renew_it() -> None:
    async with bench({"shm": ScriptedWriter(None), "tcp": ScriptedWriter()}, lease_s=0.9) as b:
        assert await b.up() == "tcp"
        await until(lambda: b.answering.renewals >= 3, "renewals")
        assert b.told.downs == []


@pytest.mark.parametrize("before", [[], [REFUSED]])
async def test_settings_that_differ_are_not_got_around(before: list[Exception]) -> None:
    """TLS on one end: the operator hears of it, and no other transport moves a byte."""
    last = ScriptedWriter()
    first: dict[str, Writer] = {"shm": ScriptedWriter(*before)} if before else {}
    async with bench(first | {"tcp": ScriptedWriter(Mismatch("tls", "on", "off")), "nixl": last}) as b:
        reason, message = await b.down()
        assert reason is RefusalReason.MISMATCH
        assert "tls differs: here on, there off" in message
        assert ("shm: d0 refused the connection" in message) == bool(before)
        assert (last.tried, b.told.ups) == ([], 0)


async def test_where_none_connects_one_bounded_error_names_every_try() -> None:
    wordy = PeerClosed("no way\n" * 1000)
    async with bench({"shm": ScriptedWriter(REFUSED), "tcp": ScriptedWriter(wordy)}) as b:
        reason, message = await b.down()
        assert reason is RefusalReason.UNREACHABLE
        assert message.startswith("d0: no transport works: shm: d0 refused the connection; tcp: no way no way ")
        assert "\n" not in message
        assert len(message) < 2 * WHY_CHARS + 50
        assert not b.stream.up


async def test_after_a_break_the_best_is_tried_again() -> None:
    first, second = ScriptedWriter(REFUSED), ScriptedWriter()
    async with bench({"shm": first, "tcp": second}, lease_s=0.3) as b:
        assert await b.up() == "tcp"
        b.answering.broken.set()  # at the next renewal
        await until(lambda: b.told.downs, "the break")
        assert await b.up() == "shm"
        assert b.stream.note == ""
        assert b.answering.handshakes == 2


async def test_endpoints_that_this_side_does_not_know_are_passed_over() -> None:
    with_unknown = [("warp", "nowhere"), ("tcp", "at-tcp"), ("tcp", "at-tcp")]
    async with bench({"tcp": ScriptedWriter()}, with_unknown) as b:
        assert (await b.up(), b.stream.note) == ("tcp", "")


# -- real transports ---------------------------------------------------------------------------------------------


class Pools:
    """A writer of each kind, and receivers of two decode workers."""

    def __init__(self) -> None:
        self.source, self.memory, self.elsewhere = (PoolMemory(LAYOUT, 4) for _ in range(3))
        events = Recorder()
        self.shm = ShmReceiver(self.memory, events)
        self.tcp = TcpReceiver(self.memory, events)
        self.other = TcpReceiver(self.elsewhere, events)
        self.writers: dict[str, Writer] = {"shm": ShmWriter(self.source, "p-1"), "tcp": TcpWriter(self.source)}

    @property
    def misled(self) -> str:
        """Where a wrong `--tcp-advertise` leads: to the other worker."""
        return f"{self.other.endpoint().partition('#')[0]}#{self.tcp.endpoint().partition('#')[2]}"

    def close(self) -> None:
        for receiver in (self.shm, self.tcp, self.other):
            receiver.close()
        for memory in (self.source, self.memory, self.elsewhere):
            memory.close()


@pytest.fixture
def pools() -> Iterator[Pools]:
    made = Pools()
    yield made
    made.close()


@contextmanager
def unix_socket(then: Callable[[socket.socket], None] | None) -> Iterator[str]:
    """An shm endpoint that is no receiver: without `then` it does not answer."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind("\0" + (name := f"baton-test-{time.monotonic_ns()}"))
        listener.listen()

        def serve() -> None:
            accepted, _ = listener.accept()
            with accepted:
                if then is not None:
                    then(accepted)
                else:
                    accepted.recv(1000)
                    accepted.recv(1000)  # until the writer leaves

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"@{name}"
        finally:
            thread.join()


@pytest.mark.parametrize(
    ("then", "why"),
    [
        (lambda accepted: accepted.close(), "d0"),
        (lambda accepted: accepted.recv(1000), "d0 refused the connection"),
        (lambda accepted: (accepted.recv(1000), accepted.send(b"what?")), "d0 refused the connection"),
        (None, "d0 did not answer"),
    ],
)
async def test_shared_memory_that_can_not_be_had_gives_way_to_tcp(
    pools: Pools, then: Callable[[socket.socket], None] | None, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CONNECT_S", 2.0 if then else 0.8)
    with unix_socket(then) as address:
        async with bench(pools.writers, [("shm", address), ("tcp", pools.tcp.endpoint())]) as b:
            assert await b.up() == "tcp"
            assert b.stream.note.startswith(f"shm: {why}")


async def test_a_wrong_address_for_tcp_gives_way_to_what_works(pools: Pools) -> None:
    async with bench(pools.writers, [("tcp", pools.misled), ("shm", pools.shm.endpoint())]) as b:
        assert await b.up() == "shm"
        assert "tcp: d0 is not at 127.0.0.1:" in b.stream.note
        assert "another receiver answers there" in b.stream.note


async def test_a_wrong_address_for_tcp_is_named_where_nothing_else_works(pools: Pools) -> None:
    async with bench(pools.writers, [("shm", "@baton-nowhere"), ("tcp", pools.misled)]) as b:
        reason, message = await b.down()
        assert reason is RefusalReason.UNREACHABLE
        assert "shm: d0 at @baton-nowhere: [Errno 111] Connection refused; tcp: d0 is not at 127.0.0.1:" in message
        assert pools.tcp.endpoint().partition("#")[2] not in message
