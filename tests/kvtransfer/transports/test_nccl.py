"""What NCCL makes hard: deadlines, aborts, communicators that come and go. Over the double, in one process."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest

from baton.errors import BatonError, DeadlineExceeded, Mismatch, PeerClosed, WriteRefused
from baton.model import KvLayout
from kvtransfer.blocks.memory import PoolMemory
from kvtransfer.transports.nccl.double import DoubleDevice
from kvtransfer.transports.nccl.issuer import Issuer, Link
from kvtransfer.transports.nccl.seam import Span
from kvtransfer.transports.nccl.writer import NcclWriter
from tests.kvtransfer.transports.harness import GENEROUS, LAYOUT, moves, settle, until
from tests.kvtransfer.transports.nccl_sides import RECEIVER, Setup
from tests.kvtransfer.transports.patterns import pattern


@pytest.fixture
def setup(nothing_left: None) -> Iterator[Setup]:
    made = Setup()
    yield made
    made.close()


def test_one_communicator_serves_all_batches_of_a_pair(setup: Setup) -> None:
    side = setup.side()
    channel = side.connect(setup.receiver)
    assert (setup.device.opened, side.device.opened) == (0, 0), "it is made when a batch needs it"
    for first in range(0, 40, 10):
        ticket = setup.bench.ticket(range(first, first + 10))
        assert setup.write(channel, ticket, range(10)).result(GENEROUS).bytes == 10 * LAYOUT.block_bytes
        assert setup.intact(side, ticket)
    assert (setup.device.minted, setup.device.opened, side.device.opened) == (1, 1, 1)
    assert side.device.minted == 0


@pytest.mark.parametrize("what", ["write_token", "generation", "writer"])
def test_nothing_is_minted_or_posted_for_a_write_that_is_refused(setup: Setup, what: str) -> None:
    side = setup.side()
    channel = side.connect(setup.receiver)
    ticket = setup.bench.ticket(range(4), generation=4, writer="another" if what == "writer" else "writer")
    forged = {"write_token": replace(ticket, write_token=b"x" * 16), "generation": replace(ticket, generation=3)}
    with pytest.raises(WriteRefused):
        setup.write(channel, forged.get(what, ticket), range(4)).result(GENEROUS)
    assert (setup.device.minted, setup.device.opened, side.device.opened) == (0, 0, 0)


def test_sends_wait_for_what_fills_the_blocks(setup: Setup) -> None:
    side = setup.side()
    side.fence = threading.Event()
    channel = side.connect(setup.receiver)
    ticket = setup.bench.ticket(range(4))
    writing = setup.write(channel, ticket, range(4))
    until(lambda: any(link.posted == 1 for link in side.issuer._links))
    assert not any(setup.bench.content(0))
    for block in range(4):
        side.memory.block(block)[:] = pattern(99, block, LAYOUT.block_bytes)  # the engine's work ends only now
    side.fence.set()
    writing.result(GENEROUS)
    assert all(setup.bench.content(b) == pattern(99, b, LAYOUT.block_bytes) for b in range(4))


@pytest.mark.parametrize("at", ["receiver", "writer"])
def test_after_an_error_in_the_middle_the_communicator_is_made_anew(setup: Setup, at: str) -> None:
    side = setup.side()
    channel = side.connect(setup.receiver)
    first, second = setup.bench.ticket(range(8)), setup.bench.ticket(range(8, 16))
    setup.write(channel, first, range(8)).result(GENEROUS)
    (setup.device if at == "receiver" else side.device).faults.fail_next = "remote process exited"
    scattered = replace(second, blocks=tuple(reversed(second.blocks)))
    setup.receiver.admit(scattered)
    setup.write(channel, scattered, range(8)).result(GENEROUS)
    assert setup.intact(side, scattered)
    assert setup.events.landed_indices(second.key) == set(range(8))
    assert (setup.device.minted, side.device.opened) == (2, 2)


def test_a_second_error_ends_the_write_and_the_next_channel_works(setup: Setup) -> None:
    side = setup.side()
    channel = side.connect(setup.receiver)
    ticket = setup.bench.ticket(range(4))

    def fail_all() -> None:
        while not failing.done():
            side.device.faults.fail_next = "unhandled cuda error"
            time.sleep(0.001)

    side.device.faults.fail_next = "unhandled cuda error"
    failing = setup.write(channel, ticket, range(4))
    fail_all()
    with pytest.raises(PeerClosed, match="unhandled cuda error"):
        failing.result(GENEROUS)
    side.device.faults.fail_next = ""
    setup.write(side.connect(setup.receiver), ticket, range(4)).result(GENEROUS)
    assert setup.intact(side, ticket)


@pytest.mark.parametrize("stalled", ["receiver", "writer"])
def test_a_stalled_group_ends_at_the_deadline_and_then_nothing_moves(setup: Setup, stalled: str) -> None:
    side = setup.side()
    channel = side.connect(setup.receiver)
    ticket = setup.bench.ticket(range(8))
    faults = (setup.device if stalled == "receiver" else side.device).faults
    receiving = setup.bench.issuer
    assert receiving is not None
    faults.flowing.clear()
    started = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        setup.write(channel, ticket, range(8), seconds=0.5).result(GENEROUS)
    assert 0.4 < time.monotonic() - started < 30
    setup.receiver.revoke(ticket.key)
    setup.events.wait(lambda e: e.revocations == [ticket.key])
    faults.flowing.set()
    before = [setup.bench.content(block) for block in range(8)]
    until(lambda: not side.issuer._links and not receiving._links)
    assert [setup.bench.content(block) for block in range(8)] == before
    assert setup.events.landings == []
    with pytest.raises(PeerClosed):
        channel.write(ticket, moves(ticket, range(8)), time.monotonic() + 1)


def test_a_writer_that_dies_in_the_middle_is_no_hang(setup: Setup) -> None:
    side = setup.side()
    channel = side.connect(setup.receiver)
    ticket = setup.bench.ticket(range(8))
    side.device.faults.flowing.clear()  # the receives are posted, and nothing comes
    writing = setup.write(channel, ticket, range(8))
    until(lambda: setup.device.opened == 1)
    side.issuer.close()
    channel.close()
    assert isinstance(writing.exception(GENEROUS), BatonError)
    setup.receiver.revoke(ticket.key)
    setup.events.wait(lambda e: e.revocations == [ticket.key])
    assert setup.events.landings == []


def test_the_proof_waits_until_the_stream_is_drained(setup: Setup) -> None:
    side = setup.side()
    channel = side.connect(setup.receiver)
    ticket, other = setup.bench.ticket(range(8)), setup.bench.ticket(range(8, 16))
    setup.write(channel, other, range(8)).result(GENEROUS)
    side.device.faults.flowing.clear()
    setup.device.faults.draining.clear()
    writing = setup.write(channel, ticket, range(8))
    until(lambda: ticket.key in setup.receiver._writing)
    setup.receiver.revoke(ticket.key)
    setup.receiver.revoke(other.key)  # nothing of it is under way
    with pytest.raises(WriteRefused, match="revoked"):
        writing.result(GENEROUS)
    setup.events.wait(lambda e: e.revocations == [other.key])
    receiving = setup.bench.issuer
    assert receiving is not None
    until(lambda: any(link.failure for link in receiving._links))
    settle(setup.receiver)
    assert setup.events.revocations == [other.key]
    setup.device.faults.draining.set()
    setup.events.wait(lambda e: e.revocations == [other.key, ticket.key])
    side.device.faults.flowing.set()
    again = setup.bench.ticket(range(16, 24))
    setup.write(channel, again, range(8)).result(GENEROUS)  # the channel is good, over a new communicator
    assert setup.device.minted == 2


def test_a_batch_that_does_not_match_moves_nothing_and_ends(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer whose group is not what was agreed: its first block is split in two."""
    side = setup.side()
    channel = side.connect(setup.receiver)
    ticket = setup.bench.ticket([5, 3])
    issue = side.issuer.post

    def split(link: Link, group: Sequence[Span], fence: object | None, deadline: float) -> None:
        half = group[0].bytes // 2
        halves = [Span(group[0].address, half), Span(group[0].address + half, half)]
        issue(link, [*halves, *group[1:]], fence, deadline)

    monkeypatch.setattr(side.issuer, "post", split)
    with pytest.raises(DeadlineExceeded):
        setup.write(channel, ticket, range(2), seconds=0.5).result(GENEROUS)
    setup.receiver.revoke(ticket.key)
    setup.events.wait(lambda e: e.revocations == [ticket.key])
    assert not any(setup.bench.content(5))
    assert setup.events.landings == []


def test_other_block_sizes_are_refused_with_both_values(setup: Setup) -> None:
    memory = PoolMemory(KvLayout(layers=1, kv_heads=1, head_dim=8, dtype="float32"), 1, shared=False)
    issuer = Issuer(DoubleDevice())
    writer = NcclWriter(memory, "w", issuer)
    with pytest.raises(Mismatch, match=f"block_bytes differs: here 1024, there {LAYOUT.block_bytes}"):
        writer.connect(setup.receiver.endpoint(), RECEIVER, time.monotonic() + GENEROUS)
    issuer.close()
    memory.close()


def test_random_revokes_and_errors_leave_only_whole_blocks(setup: Setup) -> None:
    """200 writes of two writers, of which some are revoked and some meet errors: what landed is intact."""
    sides = [setup.side("writer"), setup.side("other")]
    channels = [side.connect(setup.receiver) for side in sides]
    landed = 0
    for round_ in range(100):
        tickets = [
            setup.bench.ticket(range(8 * i, 8 * i + 8), writer=side.name, generation=round_ + 1)
            for i, side in enumerate(sides)
        ]
        for ticket in tickets:
            for block in ticket.blocks:
                setup.bench.memory.block(block)[:] = bytes(LAYOUT.block_bytes)
        if round_ % 5 == 2:
            sides[0].device.faults.fail_next = "network error"
        running = [setup.write(channel, ticket, range(8)) for channel, ticket in zip(channels, tickets, strict=True)]
        if round_ % 3 == 0:
            setup.receiver.revoke(tickets[1].key)
        for side, ticket, run in zip(sides, tickets, running, strict=True):
            if run.exception(GENEROUS) is None:
                assert setup.intact(side, ticket)
                landed += 1
            else:
                assert isinstance(run.exception(), WriteRefused)
                assert setup.events.landed_indices(ticket.key) == set()
            setup.receiver.revoke(ticket.key)
            setup.events.wait(lambda e, key=ticket.key: key in e.revocations)  # type: ignore[misc]
    assert landed >= 160
