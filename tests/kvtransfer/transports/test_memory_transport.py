"""The double's own gift: faults on demand."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from baton.errors import DeadlineExceeded, Mismatch, PeerClosed, WriteRefused
from baton.model import KvLayout
from baton.spec import ProcessRef
from kvtransfer.blocks.memory import PoolMemory
from kvtransfer.transports.memory import Faults, MemoryWriter
from tests.kvtransfer.transports.harness import GENEROUS, LAYOUT, Bench, expected, moves


@pytest.fixture
def double(nothing_left: None) -> Iterator[Bench]:
    bench = Bench("memory")
    yield bench
    bench.close()


def faults(double: Bench, writer: str = "writer") -> Faults:
    return double.network.faults(writer, double.receiver.endpoint())


def test_it_tears_in_the_middle_of_a_block(double: Bench) -> None:
    writer = double.writer()
    ticket = double.ticket(range(4))
    faults(double).tear_after = 2
    with pytest.raises(PeerClosed, match="middle"):
        writer.write(ticket, moves(ticket, range(4)))
    half = LAYOUT.block_bytes // 2
    assert double.content(2) == expected(writer, 2)[:half] + bytes(half)
    assert double.content(3) == bytes(LAYOUT.block_bytes)
    assert double.events.landings == []
    faults(double).tear_after = None
    with pytest.raises(PeerClosed):
        writer.write(ticket, moves(ticket, range(4)))
    writer.connect(double.receiver.endpoint())
    writer.write(ticket, moves(ticket, range(4)))


def test_a_slow_pair_is_overtaken(double: Bench) -> None:
    slow, fast = double.writer("slow"), double.writer("fast")
    tickets = [double.ticket([0, 1], writer="slow"), double.ticket([2, 3], writer="fast")]
    faults(double, "slow").flowing.clear()
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(slow.write, tickets[0], moves(tickets[0], [0, 1]))
        fast.write(tickets[1], moves(tickets[1], [0, 1]))
        faults(double, "slow").flowing.set()
        first.result(GENEROUS)
    assert [key for key, _, _ in double.events.landings] == [tickets[1].key, tickets[0].key]


def test_delay_and_deadline(double: Bench) -> None:
    writer = double.writer()
    ticket = double.ticket(range(4))
    faults(double).delay_s = 0.05
    assert writer.write(ticket, moves(ticket, range(4))).seconds >= 0.2
    faults(double).delay_s = 10
    started = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        writer.write(ticket, moves(ticket, range(4)), seconds=0.1)
    assert time.monotonic() - started < 9


def test_a_revoke_during_a_stall_lets_no_more_through(double: Bench) -> None:
    writer = double.writer()
    ticket = double.ticket(range(2))
    faults(double).flowing.clear()
    with ThreadPoolExecutor(1) as threads:
        write = threads.submit(writer.write, ticket, moves(ticket, [0, 1]))
        threading.Event().wait(0.05)
        double.receiver.revoke(ticket.key)
        assert double.events.revocations == [ticket.key]
        faults(double).flowing.set()
        with pytest.raises(WriteRefused):
            write.result(GENEROUS)
    assert not any(double.content(0))


def test_connect_refuses_what_does_not_fit(double: Bench) -> None:
    memory = PoolMemory(KvLayout(layers=1, kv_heads=1, head_dim=8, dtype="float32"), 1, shared=False)
    writer = MemoryWriter(memory, "w", double.network)
    with pytest.raises(Mismatch, match="block_bytes"):
        writer.connect(double.receiver.endpoint(), ProcessRef("r", "r", ""), time.monotonic() + 1)
    with pytest.raises(PeerClosed):
        writer.connect("memory:nobody", ProcessRef("r", "r", ""), time.monotonic() + 1)
    memory.close()
