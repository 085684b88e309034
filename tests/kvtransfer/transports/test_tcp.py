"""What only a socket can do wrong to a receiver: garbage, halves, silence, a flipped byte."""

from __future__ import annotations

import os
import time
import zlib
from collections.abc import Iterator

import pytest

from kvtransfer.handoffs.messages import BlockMove
from kvtransfer.transports import wire
from kvtransfer.transports.tcp.wire import HELLO, MAGIC, VERSION
from tests.kvtransfer.transports.bare_tcp import PEER, SIZE, Wire, batch, ends, exactly, soon
from tests.kvtransfer.transports.patterns import pattern

GREETING_BYTES = HELLO.size + wire.TOKEN_BYTES


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


def test_a_writer_of_another_version_is_answered_at_once(tcp: Wire) -> None:
    """Version 1 has no token: it must not be waited for."""
    bare = tcp.bare(hello=False)
    bare.sendall(HELLO.pack(MAGIC, 1, wire.Flags.CHECKSUMS, SIZE))
    assert HELLO.unpack(exactly(bare, HELLO.size)) == (MAGIC, VERSION, wire.Flags.CHECKSUMS, SIZE)
    assert ends(bare)


def test_a_writer_that_means_another_receiver_is_told_so_before_anything_else(tcp: Wire) -> None:
    """Also where more of it differs, and nothing after its first message is read."""
    for flags, size in ((wire.Flags.CHECKSUMS, SIZE), (wire.Flags(0), 2 * SIZE)):
        bare = tcp.bare(hello=False)
        bare.sendall(
            HELLO.pack(MAGIC, VERSION, flags, size) + bytes(wire.TOKEN_BYTES) + batch(tcp.ticket(), bytes(SIZE))
        )
        assert HELLO.unpack(exactly(bare, HELLO.size))[0] == wire.ELSEWHERE
        assert ends(bare)
    assert (tcp.events.landings, tcp.events.refusals) == ([], [])


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


def test_a_revoke_in_the_middle_of_a_block_drops_the_rest_of_it(tcp: Wire) -> None:
    """The connection then serves other handoffs: one that was cancelled costs them nothing."""
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
    bare.sendall(message[half:])
    answer = wire.pack_ack(wire.Status.REFUSED, wire.REVOKED)
    assert exactly(bare, len(answer)) == answer
    assert bytes(tcp.memory.block(0)) == frozen
    assert tcp.events.refusals == []
    again = tcp.ticket(range(12, 16))
    bare.sendall(batch(again, data))
    assert exactly(bare, wire.ACK.size) == wire.pack_ack(wire.Status.OK)
    bystander.sendall(other_message[half:])
    assert exactly(bystander, wire.ACK.size) == wire.pack_ack(wire.Status.OK)
    assert tcp.events.landed_indices(ticket.key) == set()


@pytest.mark.parametrize(
    "stop_at",
    [
        pytest.param(3, marks=pytest.mark.nightly),
        pytest.param(GREETING_BYTES - 3, marks=pytest.mark.nightly),
        pytest.param(GREETING_BYTES + 10, marks=pytest.mark.nightly),
        GREETING_BYTES + wire.BATCH_BYTES + 100,
    ],
)
def test_a_writer_that_stops_in_a_message_is_let_go_and_an_idle_one_stays(impatient: Wire, stop_at: int) -> None:
    idle = impatient.writer.connect(impatient.receiver.endpoint(), PEER, soon())
    message = impatient.greeting + batch(impatient.ticket(), bytes(SIZE))
    bare = impatient.bare(hello=False)
    bare.sendall(message[:stop_at])
    if stop_at > GREETING_BYTES:
        exactly(bare, HELLO.size)
    started = time.monotonic()
    assert ends(bare)  # by then the idle one has been silent for longer
    assert time.monotonic() - started < 30
    idle.write(impatient.ticket(), [BlockMove(0, 0, 0)], soon())
    idle.close()
