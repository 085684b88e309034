"""Only NIXL has writes that no code on the receiver places; how they are stopped all the same."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace

import pytest

from baton.errors import ChecksumMismatch, ConfigError, Mismatch, PeerClosed, WriteRefused
from baton.model import KvLayout
from baton.spec import ProcessRef
from kvtransfer.blocks.memory import PoolMemory
from kvtransfer.transports import wire as batch_wire
from kvtransfer.transports.nixl import agent as module
from kvtransfer.transports.nixl import wire
from kvtransfer.transports.nixl.agent import restrict
from kvtransfer.transports.nixl.receiver import NixlReceiver
from kvtransfer.transports.nixl.writer import NixlWriter
from kvtransfer.transports.sockets import split_endpoint
from kvtransfer.transports.wire import checksum
from tests.kvtransfer.conftest import needs_nixl
from tests.kvtransfer.transports.harness import BLOCKS, GENEROUS, LAYOUT, Bench, ProcessWriter, host_and_port, moves

PEER = ProcessRef("receiver", "r", "")
CHECKSUM = "kvtransfer.transports.nixl.writer.checksum"


def soon() -> float:
    return time.monotonic() + GENEROUS


@pytest.fixture
def nixl(nothing_left: None) -> Iterator[Bench]:
    bench = Bench("nixl")
    yield bench
    bench.close()


@needs_nixl
def test_a_frozen_writer_is_proven_done_and_its_bytes_stay_out(nixl: Bench) -> None:
    """Stopped in whatever it does, revoked, and let go on: what it still wants to write has nowhere to go."""
    writer = nixl.writer()
    assert isinstance(writer, ProcessWriter)
    ticket = nixl.ticket(range(BLOCKS))
    writer.hammer(ticket, moves(ticket, range(BLOCKS)))
    nixl.events.wait(lambda e: len(e.landings) >= 2)
    writer.process.send_signal(signal.SIGSTOP)
    nixl.receiver.revoke(ticket.key)
    nixl.events.wait(lambda e: e.revocations == [ticket.key])
    for block in range(BLOCKS):
        nixl.memory.block(block)[:] = bytes(LAYOUT.block_bytes)
    writer.process.send_signal(signal.SIGCONT)
    assert isinstance(writer.answer(), (PeerClosed, WriteRefused))
    assert not any(any(nixl.content(block)) for block in range(BLOCKS))


@needs_nixl
def test_other_pairs_go_on_when_one_is_revoked_in_a_batch(nixl: Bench) -> None:
    frozen, other = nixl.writer("frozen"), nixl.writer("other")
    assert isinstance(frozen, ProcessWriter)
    ticket, second = nixl.ticket(range(32), writer="frozen"), nixl.ticket(range(32, BLOCKS), writer="other")
    frozen.hammer(ticket, moves(ticket, range(32)))
    nixl.events.wait(lambda e: len(e.landings) >= 1)
    frozen.process.send_signal(signal.SIGSTOP)
    nixl.receiver.revoke(ticket.key)
    nixl.events.wait(lambda e: e.revocations == [ticket.key])
    assert other.write(second, moves(second, range(32))).bytes == 32 * LAYOUT.block_bytes
    frozen.process.send_signal(signal.SIGCONT)


@needs_nixl
def test_a_corrupted_block_is_noticed(nixl: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    source = PoolMemory(LAYOUT, 2, shared=False)
    ticket = nixl.ticket([5], writer="here")
    channel = NixlWriter(source, "here", checksums=True).connect(nixl.receiver.endpoint(), PEER, soon())

    def corrupted(memory: PoolMemory, block: int, flags: batch_wire.Flags) -> int:
        sent = checksum(memory, block, flags)
        source.block(block)[7] ^= 1  # after the checksum was taken
        return sent

    monkeypatch.setattr(CHECKSUM, corrupted)
    with pytest.raises(ChecksumMismatch, match="block 0"):
        channel.write(ticket, moves(ticket, [0]), soon())
    assert nixl.events.landings == []
    monkeypatch.setattr(CHECKSUM, checksum)
    channel.write(ticket, moves(ticket, [0]), soon())  # the channel is still good
    channel.close()
    source.close()


@needs_nixl
def test_differences_are_named(nixl: Bench) -> None:
    other = PoolMemory(KvLayout(layers=1, kv_heads=2, head_dim=32, dtype="float32"), 2, shared=False)
    for writer, field in (
        (NixlWriter(other, "w", checksums=True), "block_bytes"),
        (NixlWriter(nixl.memory, "w"), "checksums"),
    ):
        with pytest.raises(Mismatch, match=field):
            writer.connect(nixl.receiver.endpoint(), PEER, soon())
    other.close()


@needs_nixl
@pytest.mark.parametrize("announced", [False, True])
def test_a_writer_that_stops_is_let_go(nothing_left: None, announced: bool) -> None:
    bench = Bench("nixl")
    bench.receiver.close()
    bench.receiver = NixlReceiver(bench.memory, bench.events, checksums=True, stall_s=0.5)
    with socket.create_connection(host_and_port(bench.receiver), GENEROUS) as bare:
        if announced:
            ticket = replace(bench.ticket([1]), writer="bare")
            bench.receiver.admit(ticket)
            token = split_endpoint(bench.receiver.endpoint())[1]
            bare.sendall(wire.pack_hello(batch_wire.Flags.CHECKSUMS, LAYOUT.block_bytes, token, "bare"))
            head = bare.recv(wire.WELCOME.size, socket.MSG_WAITALL)
            bare.recv(wire.WELCOME.unpack(head)[-1], socket.MSG_WAITALL)
            bare.sendall(batch_wire.pack_batch(ticket, [batch_wire.BlockEntry(0, 1, 0)]))
            assert bare.recv(batch_wire.ACK.size, socket.MSG_WAITALL) == batch_wire.pack_ack(batch_wire.Status.OK)
        assert bare.recv(1) == b""
    bench.close()


@needs_nixl
@pytest.mark.parametrize("garbage", [b"GET / HTTP/1.1\r\n\r\n", bytes(64), os.urandom(4096)])
def test_garbage_closes_the_connection(nixl: Bench, garbage: bytes) -> None:
    with socket.create_connection(host_and_port(nixl.receiver), GENEROUS) as bare:
        bare.sendall(garbage)
        with suppress(ConnectionResetError):  # what it did not read resets the connection
            assert bare.recv(1) == b""
    with pytest.raises(PeerClosed):
        NixlWriter(nixl.memory, "w", checksums=True).connect("127.0.0.1:1", PEER, soon())


@pytest.mark.parametrize(
    ("asked", "wrong"),
    [("all", "all"), ("posix,cma,self", "cma"), ("shm,tcp", "shm"), ("^tcp", "cma, knem, xpmem"), ("^cma", "knem")],
)
def test_what_could_not_be_stopped_is_not_allowed(asked: str, wrong: str) -> None:
    with pytest.raises(ConfigError, match=f"UCX_TLS.*{wrong}"):
        restrict({"UCX_TLS": asked})


def test_what_can_be_stopped_is_left_alone() -> None:
    for asked in ("tcp", "rc,ud,tcp", "posix,self", "^cma,xpmem,knem,tcp"):
        environment = {"UCX_TLS": asked}
        restrict(environment)
        assert environment == {"UCX_TLS": asked}
    unset: dict[str, str] = {}
    restrict(unset)
    assert unset == {"UCX_TLS": "^cma,knem,xpmem"}


def test_without_the_package_a_worker_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "available", lambda: False)
    memory = PoolMemory(LAYOUT, 2, shared=False)
    with pytest.raises(ConfigError, match="nixl"):
        NixlWriter(memory, "w")
    memory.close()
