"""What only a socket can do wrong: garbage, halves, silence, a flipped byte."""

from __future__ import annotations

import os
import socket
import struct
import threading
import time
import zlib
from collections.abc import Iterator

import pytest

from baton.errors import ChecksumMismatch, ConfigError, DeadlineExceeded, Mismatch, PeerClosed
from baton.model import KvLayout
from baton.spec import HandoffKey, ProcessRef
from kvtransfer.blocks.memory import PoolMemory
from kvtransfer.handoffs.messages import BlockMove, Ticket
from kvtransfer.transports import wire
from kvtransfer.transports.tcp.receiver import TcpReceiver
from kvtransfer.transports.tcp.wire import HELLO, MAGIC, VERSION
from kvtransfer.transports.tcp.writer import TcpWriter
from tests.kvtransfer.transports.harness import GENEROUS, Recorder
from tests.kvtransfer.transports.patterns import fill, pattern

LAYOUT = KvLayout(layers=2, kv_heads=2, head_dim=32, dtype="float32")  # 16 KiB a block
SIZE = LAYOUT.block_bytes
PEER = ProcessRef("receiver", "r", "")


class Wire:
    """A receiver, a pool to write from, and bare sockets to it."""

    def __init__(self, stall_s: float = GENEROUS) -> None:
        self.events = Recorder()
        self.memory, self.source = PoolMemory(LAYOUT, 300), PoolMemory(LAYOUT, 300, shared=False)
        fill(self.source, 1)
        self.receiver = TcpReceiver(self.memory, self.events, checksums=True, stall_s=stall_s)
        self.writer = TcpWriter(self.source, checksums=True)
        self.open: list[socket.socket] = []

    def ticket(self, blocks: range = range(4)) -> Ticket:
        ticket = Ticket(HandoffKey(os.urandom(16), 1), 3, os.urandom(16), tuple(blocks), 0, "w")
        self.receiver.admit(ticket)
        return ticket

    def bare(self, hello: bool = True) -> socket.socket:
        host, _, port = self.receiver.endpoint().rpartition(":")
        bare = socket.create_connection((host, int(port)), timeout=GENEROUS)
        self.open.append(bare)
        if hello:
            bare.sendall(HELLO.pack(MAGIC, VERSION, wire.Flags.CHECKSUMS, SIZE))
            assert len(exactly(bare, HELLO.size)) == HELLO.size
        return bare

    def close(self) -> None:
        for bare in self.open:
            bare.close()
        self.receiver.close()
        self.writer.close()
        self.memory.close()
        self.source.close()


@pytest.fixture
def tcp(nothing_left: None) -> Iterator[Wire]:
    tcp = Wire()
    yield tcp
    tcp.close()


@pytest.fixture
def impatient(nothing_left: None) -> Iterator[Wire]:
    tcp = Wire(stall_s=2.0)
    yield tcp
    tcp.close()


def soon() -> float:
    return time.monotonic() + GENEROUS


def batch(ticket: Ticket, data: bytes, index: int = 0, checksum: int | None = None) -> bytes:
    checksum = zlib.crc32(data) if checksum is None else checksum
    return wire.pack_batch(ticket, [wire.BlockEntry(index, ticket.blocks[index], checksum)]) + data


def exactly(bare: socket.socket, size: int) -> bytes:
    """`size` bytes, or fewer where the connection ends. (MSG_WAITALL does not wait on a socket with a time-out.)"""
    data = b""
    while len(data) < size and (piece := bare.recv(size - len(data))):
        data += piece
    return data


def ends(bare: socket.socket) -> bool:
    try:
        return bare.recv(1) == b""
    except ConnectionResetError:
        return True


def test_a_message_in_single_bytes_is_understood(tcp: Wire) -> None:
    ticket, data = tcp.ticket(), pattern(5, 0, SIZE)
    bare = tcp.bare()
    message = batch(ticket, data)
    for position in range(150):
        bare.sendall(message[position : position + 1])
    bare.sendall(message[150:] + batch(ticket, data, 1))
    answers = exactly(bare, 2 * wire.ACK.size)
    assert answers == wire.pack_ack(wire.Status.OK) * 2
    assert tcp.events.landed_indices(ticket.key) == {0, 1}
    assert bytes(tcp.memory.block(1)) == data


@pytest.mark.parametrize("garbage", [b"GET / HTTP/1.1\r\n\r\n", bytes(64), os.urandom(4096)])
def test_garbage_closes_the_connection_and_nothing_else(tcp: Wire, garbage: bytes) -> None:
    bare, greeted = tcp.bare(hello=False), tcp.bare()
    bare.sendall(garbage)
    greeted.sendall(garbage + bytes(64))
    assert ends(bare)
    assert ends(greeted)
    channel = tcp.writer.connect(tcp.receiver.endpoint(), PEER, soon())
    ticket = tcp.ticket()
    assert channel.write(ticket, [BlockMove(0, 0, 0)], soon()).bytes == SIZE
    channel.close()


def test_a_table_that_is_too_long_is_not_believed(tcp: Wire) -> None:
    bare = tcp.bare()
    bare.sendall(wire.PREFIX.pack(wire.BATCH_MAGIC, 2**32 - 1) + bytes(44))
    assert ends(bare)


def test_a_flipped_byte_is_noticed_and_does_not_count(tcp: Wire) -> None:
    ticket, data = tcp.ticket(), pattern(5, 0, SIZE)
    bare = tcp.bare()
    bare.sendall(batch(ticket, data, checksum=zlib.crc32(data) ^ 1) + batch(ticket, data))
    magic, status, length = wire.ACK.unpack(exactly(bare, wire.ACK.size))
    assert (magic, status) == (wire.BATCH_MAGIC, wire.Status.CHECKSUM)
    exactly(bare, length)
    assert exactly(bare, wire.ACK.size) == wire.pack_ack(wire.Status.OK)
    assert len(tcp.events.landings) == 1
    assert len(tcp.events.refusals) == 1


def test_the_writer_hears_of_a_corrupted_block(tcp: Wire) -> None:
    """A relay flips one byte of the payload on the way."""
    ticket = tcp.ticket()
    host, _, port = tcp.receiver.endpoint().rpartition(":")
    with socket.create_server(("127.0.0.1", 0)) as server:

        def relay() -> None:
            with server.accept()[0] as near, socket.create_connection((host, int(port)), GENEROUS) as far:
                near.settimeout(GENEROUS)
                far.sendall(exactly(near, HELLO.size))
                near.sendall(exactly(far, HELLO.size))
                size = wire.BATCH_BYTES + wire.ENTRY.size + SIZE
                for spoil in (1, 0):
                    message = bytearray(exactly(near, size))
                    message[-1] ^= spoil
                    far.sendall(message)
                    near.sendall(far.recv(4096))

        thread = threading.Thread(target=relay)
        thread.start()
        channel = tcp.writer.connect(f"127.0.0.1:{server.getsockname()[1]}", PEER, soon())
        with pytest.raises(ChecksumMismatch, match="block 2"):
            channel.write(ticket, [BlockMove(9, 2, 2)], soon())
        assert tcp.events.landings == []
        channel.write(ticket, [BlockMove(9, 2, 2)], soon())  # the channel is still good
        thread.join(GENEROUS)
        channel.close()
    assert bytes(tcp.memory.block(2)) == pattern(1, 9, SIZE)


def test_a_revoke_in_the_middle_of_a_block_closes_its_connection(tcp: Wire) -> None:
    ticket, other, data = tcp.ticket(), tcp.ticket(range(8, 12)), pattern(5, 0, SIZE)
    bare, bystander = tcp.bare(), tcp.bare()
    message, other_message = batch(ticket, data), batch(other, data)
    half = len(message) - SIZE // 2
    bare.sendall(message[:half])
    bystander.sendall(other_message[:half])
    limit = soon()
    while bytes(tcp.memory.block(0)[: SIZE // 2]) != data[: SIZE // 2] and time.monotonic() < limit:
        time.sleep(0.005)
    tcp.receiver.revoke(ticket.key)
    tcp.events.wait(lambda e: e.revocations == [ticket.key])
    frozen = bytes(tcp.memory.block(0))
    assert frozen == data[: SIZE // 2] + bytes(SIZE // 2)
    assert ends(bare)
    assert bytes(tcp.memory.block(0)) == frozen
    bystander.sendall(other_message[half:])
    assert exactly(bystander, wire.ACK.size) == wire.pack_ack(wire.Status.OK)
    assert tcp.events.landed_indices(ticket.key) == set()


@pytest.mark.parametrize("stop_at", [3, HELLO.size + 10, HELLO.size + wire.BATCH_BYTES + 100])
def test_a_writer_that_stops_in_a_message_is_let_go(impatient: Wire, stop_at: int) -> None:
    message = HELLO.pack(MAGIC, VERSION, wire.Flags.CHECKSUMS, SIZE) + batch(impatient.ticket(), bytes(SIZE))
    bare = impatient.bare(hello=False)
    bare.sendall(message[:stop_at])
    if stop_at > HELLO.size:
        exactly(bare, HELLO.size)
    started = time.monotonic()
    assert ends(bare)
    assert time.monotonic() - started < 30


def test_an_idle_connection_stays(impatient: Wire) -> None:
    channel = impatient.writer.connect(impatient.receiver.endpoint(), PEER, soon())
    time.sleep(2.3)  # longer than a stall may last
    ticket = impatient.ticket()
    channel.write(ticket, [BlockMove(0, 0, 0)], soon())
    channel.close()


def test_many_batches_of_one_write(tcp: Wire) -> None:
    channel = tcp.writer.connect(tcp.receiver.endpoint(), PEER, soon())
    ticket = tcp.ticket(range(300))
    receipt = channel.write(ticket, [BlockMove(299 - i, i, i) for i in range(300)], soon())
    assert receipt.bytes == 300 * SIZE
    assert bytes(tcp.memory.block(7)) == pattern(1, 292, SIZE)
    assert [len(indices) for _, _, indices in tcp.events.landings] == [256, 44]
    channel.close()


def test_differences_are_named(tcp: Wire) -> None:
    other = PoolMemory(KvLayout(layers=1, kv_heads=2, head_dim=32, dtype="float32"), 2, shared=False)
    for writer, field in (
        (TcpWriter(other, checksums=True), "block_bytes"),
        (TcpWriter(tcp.source), "checksums"),
    ):
        with pytest.raises(Mismatch, match=field):
            writer.connect(tcp.receiver.endpoint(), PEER, soon())
    other.close()


def test_a_silent_listener_ends_the_handshake(tcp: Wire) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(DeadlineExceeded):
            tcp.writer.connect(endpoint, PEER, time.monotonic() + 0.3)
    with pytest.raises(PeerClosed):
        tcp.writer.connect(endpoint, PEER, soon())


def test_a_reset_ends_the_write(tcp: Wire) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def reset() -> None:
            near = server.accept()[0]
            near.sendall(exactly(near, HELLO.size))
            near.recv(10)
            near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            near.close()

        thread = threading.Thread(target=reset)
        thread.start()
        channel = tcp.writer.connect(f"127.0.0.1:{server.getsockname()[1]}", PEER, soon())
        with pytest.raises(PeerClosed):
            channel.write(tcp.ticket(range(300)), [BlockMove(i, i, i) for i in range(300)], soon())
        thread.join(GENEROUS)
        channel.close()


def test_closing_a_channel_ends_its_write(tcp: Wire) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        accepted: list[socket.socket] = []

        def greet() -> None:
            near = server.accept()[0]
            near.sendall(exactly(near, HELLO.size))
            accepted.append(near)

        thread = threading.Thread(target=greet)
        thread.start()
        channel = tcp.writer.connect(f"127.0.0.1:{server.getsockname()[1]}", PEER, soon())
        threading.Timer(0.2, channel.close).start()
        with pytest.raises(PeerClosed):
            channel.write(tcp.ticket(range(4)), [BlockMove(0, 0, 0)], soon())
        thread.join(GENEROUS)
        channel.close()
        accepted[0].close()


def test_addresses() -> None:
    memory, events = PoolMemory(LAYOUT, 2, shared=False), Recorder()
    if socket.has_ipv6:
        six = TcpReceiver(memory, events, host="::1")
        assert six.endpoint().startswith("[::1]:")
        TcpWriter(memory).connect(six.endpoint(), PEER, soon()).close()
        six.close()
    wide = TcpReceiver(memory, events, host="0.0.0.0", advertise="127.0.0.1")
    assert wide.endpoint().startswith("127.0.0.1:")
    with pytest.raises(ConfigError, match="can't listen"):
        TcpReceiver(memory, events, port=int(wide.endpoint().rpartition(":")[2]))
    wide.close()
    with pytest.raises(ConfigError, match="address"):
        TcpReceiver(memory, events, host="0.0.0.0")
    memory.close()
