"""A TCP writer against any receiver: one of ours, one that differs, one that is silent, resets or spoils."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Iterator

import pytest

from baton.errors import ChecksumMismatch, ConfigError, DeadlineExceeded, Mismatch, PeerClosed
from baton.model import KvLayout
from kvtransfer.blocks.memory import PoolMemory
from kvtransfer.handoffs.messages import BlockMove
from kvtransfer.transports import wire
from kvtransfer.transports.tcp.receiver import TcpReceiver
from kvtransfer.transports.tcp.wire import HELLO, MAGIC
from kvtransfer.transports.tcp.writer import TcpWriter
from tests.kvtransfer.transports.bare_tcp import LAYOUT, PEER, SIZE, Wire, exactly, soon
from tests.kvtransfer.transports.harness import GENEROUS, Recorder, host_and_port
from tests.kvtransfer.transports.patterns import pattern


@pytest.fixture
def tcp(nothing_left: None) -> Iterator[Wire]:
    tcp = Wire()
    yield tcp
    tcp.close()


def test_the_writer_hears_of_a_corrupted_block(tcp: Wire) -> None:
    """A relay flips one byte of the payload on the way."""
    ticket = tcp.ticket()
    with socket.create_server(("127.0.0.1", 0)) as server:

        def relay() -> None:
            with server.accept()[0] as near, socket.create_connection(host_and_port(tcp.receiver), GENEROUS) as far:
                near.settimeout(GENEROUS)
                far.sendall(exactly(near, HELLO.size + wire.TOKEN_BYTES))
                near.sendall(exactly(far, HELLO.size))
                size = wire.BATCH_BYTES + wire.ENTRY.size + SIZE
                for spoil in (1, 0):
                    message = bytearray(exactly(near, size))
                    message[-1] ^= spoil
                    far.sendall(message)
                    near.sendall(far.recv(4096))

        thread = threading.Thread(target=relay)
        thread.start()
        channel = tcp.writer.connect(tcp.relayed(server), PEER, soon())
        with pytest.raises(ChecksumMismatch, match="block 2"):
            channel.write(ticket, [BlockMove(9, 2, 2)], soon())
        assert tcp.events.landings == []
        channel.write(ticket, [BlockMove(9, 2, 2)], soon())  # the channel is still good
        thread.join(GENEROUS)
        channel.close()
    assert bytes(tcp.memory.block(2)) == pattern(1, 9, SIZE)


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


def test_a_receiver_of_another_version_is_named(tcp: Wire) -> None:
    """Version 1 gives no token in its endpoint."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            with server.accept()[0] as near:
                near.settimeout(GENEROUS)
                exactly(near, HELLO.size)
                near.sendall(HELLO.pack(MAGIC, 1, wire.Flags.CHECKSUMS, SIZE))
                exactly(near, wire.TOKEN_BYTES)

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(Mismatch, match="tcp version differs: here 2, there 1"):
            tcp.writer.connect(f"127.0.0.1:{server.getsockname()[1]}", PEER, soon())
        thread.join(GENEROUS)


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
        every = TcpReceiver(memory, events, host="::", advertise="::1")
        TcpWriter(memory).connect(every.endpoint(), PEER, soon()).close()
        TcpWriter(memory).connect(every.endpoint().replace("[::1]", "127.0.0.1"), PEER, soon()).close()
        every.close()
    wide = TcpReceiver(memory, events, host="0.0.0.0", advertise="127.0.0.1")
    assert wide.endpoint().startswith("127.0.0.1:")
    with pytest.raises(ConfigError, match="can't listen"):
        TcpReceiver(memory, events, port=host_and_port(wide)[1])
    wide.close()
    with pytest.raises(ConfigError, match="address"):
        TcpReceiver(memory, events, host="0.0.0.0")
    memory.close()
