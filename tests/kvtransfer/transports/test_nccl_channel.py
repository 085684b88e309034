"""The writer against a receiver that is not ours, or answers in an order of its own."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from baton.errors import DeadlineExceeded, Mismatch, PeerClosed, WriteRefused
from baton.spec import HandoffKey
from kvtransfer.handoffs.messages import Ticket
from kvtransfer.transports.nccl import wire
from kvtransfer.transports.nccl.double import DoubleDevice
from kvtransfer.transports.nccl.issuer import Issuer, Link
from kvtransfer.transports.nccl.seam import RECEIVER as RECEIVING
from kvtransfer.transports.nccl.writer import NcclChannel
from tests.kvtransfer.transports.harness import GENEROUS, LAYOUT, moves
from tests.kvtransfer.transports.nccl_sides import RECEIVER, Side

TICKET = Ticket(HandoffKey(bytes(16), 1), 1, bytes(16), (3, 4), 0, "writer")
WELCOME = wire.frame(wire.NcclOp.WELCOME, wire.HELLO.pack(wire.MAGIC, wire.VERSION, LAYOUT.block_bytes))


class Stranger:
    """Listens where a receiver would."""

    def __init__(self) -> None:
        self.side = Side("writer", 1)
        self.threads = ThreadPoolExecutor(2)
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.listener.settimeout(GENEROUS)
        self.peer: socket.socket | None = None
        self.channel: NcclChannel | None = None

    def connect(self, answer: bytes, seconds: float = GENEROUS) -> None:
        """Answers the writer's first message with this."""
        endpoint = f"127.0.0.1:{self.listener.getsockname()[1]}"
        deadline = time.monotonic() + seconds
        connecting = self.threads.submit(self.side.writer.connect, endpoint, RECEIVER, deadline)
        self.peer = self.listener.accept()[0]
        self.peer.settimeout(GENEROUS)
        assert self.peer.recv(4096)
        self.peer.sendall(answer)
        self.channel = connecting.result(GENEROUS)
        self.side.channels.append(self.channel)

    def close(self) -> None:
        for opened in (self.peer, self.listener):
            if opened is not None:
                opened.close()
        self.side.close()
        self.threads.shutdown()


@pytest.fixture
def stranger(nothing_left: None) -> Iterator[Stranger]:
    made = Stranger()
    yield made
    made.close()


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", PeerClosed),
        (wire.frame(wire.NcclOp.WELCOME, b"short"), PeerClosed),
        (wire.frame(wire.NcclOp.WELCOME, wire.HELLO.pack(b"XXXX", wire.VERSION, LAYOUT.block_bytes)), PeerClosed),
        (wire.frame(wire.NcclOp.WELCOME, wire.HELLO.pack(wire.MAGIC, wire.VERSION + 1, LAYOUT.block_bytes)), Mismatch),
        (wire.frame(wire.NcclOp.WELCOME, wire.HELLO.pack(wire.MAGIC, wire.VERSION, 512)), Mismatch),
    ],
)
def test_what_is_no_receiver_of_ours_is_not_connected_to(
    stranger: Stranger, answer: bytes, error: type[Exception]
) -> None:
    with pytest.raises(error):
        stranger.connect(answer)


def test_a_receiver_that_does_not_answer_ends_at_the_deadline(stranger: Stranger) -> None:
    with pytest.raises(DeadlineExceeded):
        stranger.connect(b"", seconds=0.2)


@pytest.mark.parametrize("answer", [wire.pack_number(wire.NcclOp.SENT, 1), wire.frame(wire.NcclOp.PAIR, b"short")])
def test_a_receiver_that_leaves_the_protocol_ends_the_write(stranger: Stranger, answer: bytes) -> None:
    stranger.connect(WELCOME)
    assert stranger.channel is not None
    assert stranger.peer is not None
    writing = stranger.threads.submit(stranger.channel.write, TICKET, moves(TICKET, [0]), time.monotonic() + GENEROUS)
    stranger.peer.sendall(answer)
    with pytest.raises(PeerClosed):
        writing.result(GENEROUS)


def test_a_communicator_offered_with_a_refusal_is_joined_by_the_next_write(stranger: Stranger) -> None:
    stranger.connect(WELCOME)
    assert stranger.channel is not None
    assert stranger.peer is not None
    issuer, minted, opened = Issuer(DoubleDevice()), threading.Event(), threading.Event()

    def changed(link: Link) -> None:
        (opened if link.opened else minted).set()

    link = issuer.open(RECEIVING, b"", time.monotonic() + GENEROUS, changed)
    assert minted.wait(GENEROUS)
    deadline = time.monotonic() + GENEROUS
    first = stranger.threads.submit(stranger.channel.write, TICKET, moves(TICKET, [0]), deadline)
    assert stranger.peer.recv(4096)
    refusal = wire.pack_answer(1, wire.BatchStatus.REFUSED, "revoked")
    stranger.peer.sendall(refusal + wire.pack_number(wire.NcclOp.PAIR, 1, link.unique_id))
    with pytest.raises(WriteRefused, match="revoked"):
        first.result(GENEROUS)
    second = stranger.threads.submit(stranger.channel.write, TICKET, moves(TICKET, [0]), deadline)
    assert opened.wait(GENEROUS)
    stranger.peer.close()
    with pytest.raises(PeerClosed):
        second.result(GENEROUS)
    issuer.close()
