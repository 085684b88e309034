"""What only shared memory has: descriptors, credentials, and the proof by a process's end."""

from __future__ import annotations

import ctypes
import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path

import pytest

from baton.errors import ChecksumMismatch, ConfigError, DeadlineExceeded, Mismatch, PeerClosed
from baton.model import KvLayout
from baton.spec import HandoffKey, ProcessRef
from kvtransfer.blocks.memory import PoolMemory, copy_runs
from kvtransfer.handoffs.messages import BlockMove, Ticket
from kvtransfer.transports.shm import receiver as module
from kvtransfer.transports.shm import wire
from kvtransfer.transports.shm.receiver import ShmReceiver
from kvtransfer.transports.shm.writer import ShmWriter
from tests.kvtransfer.transports.harness import GENEROUS, LAYOUT, Bench, ProcessWriter, Recorder, moves, settle, until

PEER = ProcessRef("receiver", "r", "")


def soon() -> float:
    return time.monotonic() + GENEROUS


@pytest.fixture
def shm(nothing_left: None) -> Iterator[Bench]:
    bench = Bench("shm")
    yield bench
    bench.close()


def bare(shm: Bench) -> socket.socket:
    connected = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connected.settimeout(GENEROUS)
    connected.connect("\0" + shm.receiver.endpoint().removeprefix("@"))
    return connected


def test_closing_a_channel_is_no_proof_but_the_end_is(shm: Bench) -> None:
    writer = shm.writer()
    ticket = shm.ticket(range(4))
    writer.write(ticket, moves(ticket, [0]))
    writer.connect(shm.receiver.endpoint())  # the first channel is dropped, the process lives
    assert isinstance(shm.receiver, ShmReceiver)
    connections = shm.receiver._connections
    until(lambda: len(connections) == 1)
    settle(shm.receiver)
    assert shm.events.gone == []
    writer.close()
    shm.events.wait(lambda e: e.gone == ["writer"])


def test_a_stopped_writer_proves_nothing(shm: Bench) -> None:
    writer = shm.writer()
    assert isinstance(writer, ProcessWriter)
    writer.process.send_signal(19)
    state = Path(f"/proc/{writer.process.pid}/stat")
    until(lambda: state.read_text().rpartition(")")[2].split()[0] == "T")
    settle(shm.receiver)
    assert shm.events.gone == []
    writer.process.send_signal(18)
    writer.close()
    shm.events.wait(lambda e: e.gone == ["writer"])


def test_what_was_finished_before_the_end_counts(shm: Bench) -> None:
    writer = shm.writer()
    ticket = shm.ticket(range(4))
    writer.write(ticket, moves(ticket, range(4)))
    writer.kill()
    shm.events.wait(lambda e: e.gone == ["writer"])
    assert shm.events.landed_indices(ticket.key) == {0, 1, 2, 3}


def test_another_process_can_not_take_an_incarnation(shm: Bench) -> None:
    shm.writer("same")
    second = ProcessWriter("shm", "same", 9)
    with pytest.raises(PeerClosed):
        second.connect(shm.receiver.endpoint())
    second.close()
    assert shm.events.gone == []


def test_a_ticket_is_for_its_writer_only(shm: Bench) -> None:
    shm.writer("one")
    thief = shm.writer("two")
    ticket = shm.ticket([1], writer="one")
    with pytest.raises(Exception, match="another process"):
        thief.write(ticket, moves(ticket, [0]))
    assert not any(shm.memory.block(1))


def test_without_peer_pidfds_the_start_time_decides(shm: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SO_PEERPIDFD", 9999)
    writer = shm.writer()
    ticket = shm.ticket([1])
    writer.write(ticket, moves(ticket, [0]))
    monkeypatch.setattr(wire, "start_time", lambda _pid: -1)
    late = ProcessWriter("shm", "late", 9)
    with pytest.raises(PeerClosed):
        late.connect(shm.receiver.endpoint())
    late.close()
    writer.kill()
    shm.events.wait(lambda e: e.gone == ["writer"])


def test_another_users_process_gets_nothing(shm: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with bare(shm) as stranger:
        assert stranger.recv(1) == b""


@pytest.mark.parametrize(
    "packet",
    [
        b"x",
        bytes(100),
        wire.HELLO.pack(wire.MAGIC, wire.VERSION, 0, LAYOUT.block_bytes, 0),
        os.urandom(5000),
    ],
)
def test_garbage_gets_no_memory(shm: Bench, packet: bytes) -> None:
    with bare(shm) as stranger:
        stranger.send(packet)
        data, fds, _, _ = socket.recv_fds(stranger, 4096, 1)
        assert (data, fds) == (b"", [])


def test_a_silent_connection_is_let_go(shm: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shm.receiver, "_stall_s", 0.2)
    with bare(shm) as silent:
        assert silent.recv(1) == b""


def test_another_block_size_is_named(shm: Bench) -> None:
    memory = PoolMemory(KvLayout(layers=1, kv_heads=1, head_dim=16, dtype="float32"), 2, shared=False)
    with pytest.raises(Mismatch, match="block_bytes"):
        ShmWriter(memory, "w", checksums=True).connect(shm.receiver.endpoint(), PEER, soon())
    memory.close()


def test_nobody_and_a_silent_listener(shm: Bench) -> None:
    writer = ShmWriter(shm.memory, "w", checksums=True)
    with pytest.raises(PeerClosed):
        writer.connect("@baton-kv-nobody", PEER, soon())
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as silent:
        silent.bind("\0baton-kv-test-silent")
        silent.listen()
        with pytest.raises(DeadlineExceeded):
            writer.connect("@baton-kv-test-silent", PEER, time.monotonic() + 0.2)


def test_a_private_pool_can_not_be_shared() -> None:
    memory = PoolMemory(LAYOUT, 2, shared=False)
    with pytest.raises(ConfigError, match="shared memory"):
        ShmReceiver(memory, Recorder())
    memory.close()


def corrupting(target: int, source: int, targets: Sequence[int], sources: Sequence[int], size: int) -> None:
    copy_runs(target, source, targets, sources, size)
    ctypes.memset(target + targets[-1] * size + 5, 1, 1)


@pytest.mark.parametrize("checksums", [True, False])
def test_a_corrupted_byte_is_found_with_checksums_on(nothing_left: None, checksums: bool) -> None:
    source, memory, events = PoolMemory(LAYOUT, 4, shared=False), PoolMemory(LAYOUT, 8), Recorder()
    receiver = ShmReceiver(memory, events, checksums)
    ticket = Ticket(HandoffKey(os.urandom(16), 1), 1, os.urandom(16), (3, 6), 0, "w")
    receiver.admit(ticket)
    writer = ShmWriter(source, "w", copy_blocks=corrupting, checksums=checksums)
    channel = writer.connect(receiver.endpoint(), PEER, soon())
    with pytest.raises(ChecksumMismatch, match="block 1") if checksums else nullcontext():
        channel.write(ticket, moves(ticket, [0, 1]), soon())
    assert events.landed_indices(ticket.key) == (set() if checksums else {0, 1})
    assert len(events.refusals) == checksums
    channel.close()
    receiver.close()
    memory.close()
    source.close()


def test_checksums_on_one_end_only_are_named(shm: Bench) -> None:
    with pytest.raises(Mismatch, match="checksums"):
        ShmWriter(shm.memory, "w").connect(shm.receiver.endpoint(), PEER, soon())


def test_neighbours_are_copied_together_and_land_right(shm: Bench) -> None:
    """Runs of source and destination that start and stop at different places."""
    source = PoolMemory(LAYOUT, 12, shared=False)
    for block in range(12):
        source.block(block)[:] = bytes([block + 1]) * LAYOUT.block_bytes
    ticket = Ticket(HandoffKey(os.urandom(16), 1), 1, os.urandom(16), (3, 4, 5, 9, 10, 1), 0, "w")
    shm.receiver.admit(ticket)
    channel = ShmWriter(source, "w", checksums=True).connect(shm.receiver.endpoint(), PEER, soon())
    plan = [2, 3, 7, 8, 9, 10]
    channel.write(ticket, [BlockMove(s, ticket.blocks[i], i) for i, s in enumerate(plan)], soon())
    assert [shm.memory.block(b)[0] for b in ticket.blocks] == [s + 1 for s in plan]
    channel.close()
    with pytest.raises(PeerClosed):
        channel.write(ticket, [BlockMove(2, 3, 0)], soon())
    channel.close()
    source.close()
