"""The receiver against a writer that breaks the protocol, or stops in the middle of it."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import pytest

from baton.spec import HandoffKey
from kvtransfer.handoffs.messages import Ticket
from kvtransfer.transports.nccl import wire
from kvtransfer.transports.nccl.double import DoubleDevice
from kvtransfer.transports.nccl.issuer import Issuer, Link
from kvtransfer.transports.nccl.receiver import NcclReceiver
from kvtransfer.transports.nccl.seam import SENDER, UNIQUE_ID_BYTES, Span
from kvtransfer.transports.sockets import split_endpoint
from tests.kvtransfer.transports.harness import GENEROUS, LAYOUT, Bench, host_and_port, moves, settle, until

SIZE = LAYOUT.block_bytes


class RawWriter:
    """Speaks the protocol by hand; sends from the receiver's own block 60 on."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.socket = socket.create_connection(host_and_port(bench.receiver), timeout=GENEROUS)
        self.issuer = Issuer(DoubleDevice())
        self._buffer = bytearray()
        self._changed = threading.Condition()

    def hello(self) -> None:
        token = split_endpoint(self.bench.receiver.endpoint())[1]
        self.put(wire.frame(wire.NcclOp.HELLO, wire.HELLO.pack(wire.MAGIC, wire.VERSION, SIZE) + token + b"writer"))
        assert self.take()[0] is wire.NcclOp.WELCOME

    def batch(self, ticket: Ticket, indices: Sequence[int], seconds: float = GENEROUS, serial: int = 1) -> None:
        runs = [run for run, _ in wire.runs_of(moves(ticket, indices))]
        self.put(wire.pack_batch(serial, seconds, ticket, runs))

    def join(self) -> Link:
        op, body = self.take()
        assert op is wire.NcclOp.PAIR
        return self.issuer.open(
            SENDER, wire.unpack_number(body, UNIQUE_ID_BYTES)[1], time.monotonic() + GENEROUS, self._link_changed
        )

    def send(self, link: Link, blocks: int) -> None:
        """Post one send of so many blocks, and wait until it has ended."""
        self.wait(lambda: link.opened)
        group = [Span(self.bench.memory.address + 60 * SIZE, blocks * SIZE)]
        self.issuer.post(link, group, None, time.monotonic() + GENEROUS)
        self.wait(lambda: link.completed == 1)

    def answer(self) -> tuple[int, wire.BatchStatus, str]:
        op, body = self.take()
        assert op is wire.NcclOp.ANSWER, op
        return wire.unpack_answer(body)

    def put(self, data: bytes) -> None:
        self.socket.sendall(data)

    def take(self) -> tuple[wire.NcclOp, bytes]:
        while (message := wire.take_frame(self._buffer)) is None:
            data = self.socket.recv(4096)
            assert data, "the receiver closed the connection"
            self._buffer += data
        return message

    def closed(self) -> bool:
        try:
            while self.socket.recv(4096):
                pass
        except ConnectionResetError:
            pass  # closed too, with something of ours unread
        return True

    def close(self) -> None:
        self.socket.close()
        self.issuer.close()

    def wait(self, condition: Callable[[], bool]) -> None:
        with self._changed:
            assert self._changed.wait_for(condition, GENEROUS)

    def _link_changed(self, _link: Link) -> None:
        with self._changed:
            self._changed.notify_all()


@pytest.fixture
def nccl(nothing_left: None) -> Iterator[Bench]:
    bench = Bench("nccl")
    bench.memory.block(60)[:] = b"\7" * SIZE
    yield bench
    bench.close()


@pytest.fixture
def raw(nccl: Bench) -> Iterator[RawWriter]:
    writer = RawWriter(nccl)
    yield writer
    writer.close()


def test_what_the_writer_does_not_vouch_for_never_counts(nccl: Bench, raw: RawWriter) -> None:
    """All bytes have come, but a writer whose deadline passed meanwhile may have changed them."""
    issuer = nccl.issuer
    assert issuer is not None
    raw.hello()
    ticket = nccl.ticket([5])
    raw.batch(ticket, [0])
    link = raw.join()
    assert raw.answer()[1] is wire.BatchStatus.READY
    raw.send(link, 1)
    until(lambda: nccl.content(5) == b"\7" * SIZE)
    until(lambda: all(link.settled for link in issuer._links))
    settle(nccl.receiver)
    assert nccl.content(5) == b"\7" * SIZE
    assert nccl.events.landings == []
    raw.put(wire.pack_number(wire.NcclOp.SENT, 1))
    assert raw.answer()[1] is wire.BatchStatus.DONE
    assert nccl.events.landed_indices(ticket.key) == {0}


def test_a_writer_that_never_joins_is_answered_at_the_deadline(nccl: Bench, raw: RawWriter) -> None:
    raw.hello()
    ticket = nccl.ticket([5])
    raw.batch(ticket, [0], seconds=0.2)
    assert raw.take()[0] is wire.NcclOp.PAIR
    assert raw.take()[0] is wire.NcclOp.GONE
    assert raw.answer() == (1, wire.BatchStatus.FAILED, "the peer did not join in time")
    nccl.receiver.revoke(ticket.key)
    nccl.events.wait(lambda e: e.revocations == [ticket.key])


def test_a_writer_that_joins_and_stops_is_answered_and_proven_at_the_deadline(nccl: Bench, raw: RawWriter) -> None:
    raw.hello()
    ticket = nccl.ticket([5])
    raw.batch(ticket, [0], seconds=0.3)
    raw.join()
    assert raw.answer()[1] is wire.BatchStatus.READY
    assert raw.take()[0] is wire.NcclOp.GONE
    assert raw.answer() == (1, wire.BatchStatus.FAILED, "the group did not end in time")
    nccl.receiver.revoke(ticket.key)
    nccl.events.wait(lambda e: e.revocations == [ticket.key])
    assert not any(nccl.content(5))


def test_a_revoke_needs_nothing_of_the_writer(nccl: Bench, raw: RawWriter) -> None:
    raw.hello()
    ticket = nccl.ticket([5])
    raw.batch(ticket, [0], seconds=600.0)
    raw.join()
    assert raw.answer()[1] is wire.BatchStatus.READY
    nccl.receiver.revoke(ticket.key)
    nccl.events.wait(lambda e: e.revocations == [ticket.key])
    assert raw.take()[0] is wire.NcclOp.GONE
    assert raw.answer() == (1, wire.BatchStatus.REFUSED, "the handoff was revoked")
    raw.batch(nccl.ticket([6]), [0], serial=2)
    assert raw.take()[0] is wire.NcclOp.PAIR  # the connection is still good


def test_a_writer_that_says_nothing_after_its_deadline_is_cut_off(
    nccl: Bench, raw: RawWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvtransfer.transports.nccl.receiver.GRACE_SECONDS", 0.2)
    raw.hello()
    raw.batch(nccl.ticket([5]), [0], seconds=2.0)
    link = raw.join()
    raw.send(link, 1)  # and never says so
    assert raw.closed()
    assert nccl.events.landings == []


@pytest.mark.parametrize(
    "first",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        wire.frame(wire.NcclOp.HELLO, b""),
        wire.frame(wire.NcclOp.HELLO, wire.HELLO.pack(wire.MAGIC, wire.VERSION, SIZE) + bytes(16)),
        wire.frame(wire.NcclOp.HELLO, wire.HELLO.pack(wire.MAGIC, wire.VERSION, SIZE) + bytes(16) + b"w"),
        wire.frame(wire.NcclOp.HELLO, wire.HELLO.pack(b"XXXX", wire.VERSION, SIZE) + b"w"),
        wire.frame(wire.NcclOp.HELLO, wire.HELLO.pack(wire.MAGIC, wire.VERSION + 1, SIZE) + b"w"),
        wire.pack_number(wire.NcclOp.SENT, 1),
        wire.FRAME.pack(wire.NcclOp.BATCH, 2**31),
    ],
)
def test_strangers_are_cut_off(nccl: Bench, raw: RawWriter, first: bytes) -> None:
    raw.put(first)
    assert raw.closed()


@pytest.mark.parametrize(
    "then",
    [
        wire.frame(wire.NcclOp.BATCH, b"short"),
        wire.frame(wire.NcclOp.PAIR, b""),
        wire.frame(wire.NcclOp.SENT, b""),
        wire.frame(wire.NcclOp.HELLO, b""),
    ],
)
def test_a_writer_that_leaves_the_protocol_is_cut_off(nccl: Bench, raw: RawWriter, then: bytes) -> None:
    raw.hello()
    raw.put(then)
    assert raw.closed()


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf")])
def test_a_batch_without_a_deadline_is_none(nccl: Bench, raw: RawWriter, seconds: float) -> None:
    raw.hello()
    raw.batch(nccl.ticket([5]), [0], seconds=seconds)
    assert raw.closed()


def test_two_batches_at_once_or_sent_before_agreed_end_the_connection(nccl: Bench) -> None:
    for again in (True, False):
        raw = RawWriter(nccl)
        raw.hello()
        raw.batch(nccl.ticket([5]), [0])
        if again:
            raw.batch(nccl.ticket([6]), [0], serial=2)
        else:
            raw.put(wire.pack_number(wire.NcclOp.SENT, 1))
        assert raw.closed()
        raw.close()


def test_huge_runs_are_refused_at_their_first_block(nccl: Bench, raw: RawWriter) -> None:
    raw.hello()
    ticket = nccl.ticket([5])
    body = wire.pack_batch(1, 1.0, ticket, [wire.BlockRun(0, 5, 2**32 - 1)])
    raw.put(body)
    assert raw.answer()[1] is wire.BatchStatus.REFUSED
    raw.put(wire.pack_batch(2, 1.0, ticket, [wire.BlockRun(0, 5, 0)]))
    assert raw.closed()


def test_an_old_change_of_a_communicator_proves_nothing_about_its_next_group(nccl: Bench) -> None:
    """The news of a group's end comes late, when the next one is already asked for."""
    receiver = nccl.receiver
    assert isinstance(receiver, NcclReceiver)
    link = Link(0, b"", time.monotonic() + GENEROUS, lambda _link: None)
    link.opened, link.posted, link.completed = True, 1, 1
    ticket = nccl.ticket([5])
    receiver._issuer.post = lambda *_arguments: None  # type: ignore[method-assign]
    receiver._post(link, ticket.key, [], time.monotonic() + GENEROUS)
    receiver._written(link)
    receiver.revoke(ticket.key)
    settle(receiver)
    assert nccl.events.revocations == []
    link.posted = link.completed = 2
    receiver._written(link)
    assert nccl.events.revocations == [ticket.key]


def test_neighbours_on_both_sides_are_one_send() -> None:
    ticket = Ticket(HandoffKey(bytes(16), 1), 1, bytes(16), (4, 5, 6, 9, 10, 2), 0, "w")
    runs = wire.runs_of(moves(ticket, [0, 1, 2, 3, 4, 5], first_source=20))
    assert runs == [(wire.BlockRun(0, 4, 3), 20), (wire.BlockRun(3, 9, 2), 23), (wire.BlockRun(5, 2, 1), 25)]
    assert wire.runs_of(moves(ticket, [1, 0])) == [(wire.BlockRun(1, 5, 1), 1), (wire.BlockRun(0, 4, 1), 0)]
    body = wire.pack_batch(7, 1.5, ticket, [run for run, _ in runs])
    batch = wire.unpack_batch(body[wire.FRAME.size :])
    assert (batch.serial, batch.seconds, batch.identity.key) == (7, 1.5, ticket.key)
    assert [index for index, _ in batch.targets] == [0, 1, 2, 3, 4, 5]
