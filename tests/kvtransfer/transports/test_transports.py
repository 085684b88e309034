"""The conformance suite: what every transport owes, whatever moves its bytes."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from baton.errors import DeadlineExceeded, PeerClosed, WriteRefused, WriteRevoked
from kvtransfer.handoffs.messages import BlockMove, Ticket
from kvtransfer.transports.wire import OVER
from tests.kvtransfer.transports.harness import BLOCKS, LAYOUT, Bench, expected, moves

ZERO = bytes(LAYOUT.block_bytes)


def test_blocks_arrive_intact_and_nowhere_else(bench: Bench) -> None:
    writer = bench.writer()
    ticket = bench.ticket([9, 4, 30, 5, 17], cached=1)
    receipt = writer.write(ticket, moves(ticket, [1, 2, 3, 4], first_source=10))
    assert receipt.bytes == 4 * LAYOUT.block_bytes
    assert 0 < receipt.seconds < 60
    bench.events.wait(lambda e: e.landed_indices(ticket.key) == {1, 2, 3, 4})
    assert [bench.content(b) for b in (4, 30, 5, 17)] == [expected(writer, s) for s in (11, 12, 13, 14)]
    assert all(bench.content(b) == ZERO for b in set(range(BLOCKS)) - {4, 30, 5, 17})
    assert all(generation == 1 for _, generation, _ in bench.events.landings)


def test_a_receipt_says_the_bytes_that_changed(bench: Bench) -> None:
    """Counted in the receiver's memory, by us."""
    writer = bench.writer()
    ticket = bench.ticket([9, 4, 30, 5, 17, 40], cached=2)
    started = time.monotonic()
    receipts = [writer.write(ticket, moves(ticket, some)) for some in ([2, 3, 4], [5])]
    elapsed = time.monotonic() - started
    changed = sum(bench.content(block) != ZERO for block in range(BLOCKS)) * LAYOUT.block_bytes
    assert sum(receipt.bytes for receipt in receipts) == changed == 4 * LAYOUT.block_bytes
    assert 0 < sum(receipt.seconds for receipt in receipts) <= elapsed


def test_a_receipts_time_lasts_until_the_bytes_are_in_place(bench: Bench) -> None:
    """So no bandwidth that is made of it exceeds what a clock allows."""
    writer = bench.writer()
    ticket = bench.ticket(range(4))
    bench.events.flowing.clear()
    threading.Timer(0.3, bench.events.flowing.set).start()
    assert writer.write(ticket, moves(ticket, range(4))).seconds > 0.25


def test_a_whole_pool_in_any_order(bench: Bench) -> None:
    writer = bench.writer()
    blocks = [(7 * i + 3) % BLOCKS for i in range(BLOCKS)]
    ticket = bench.ticket(blocks)
    writer.write(ticket, moves(ticket, list(reversed(range(BLOCKS)))))
    bench.events.wait(lambda e: len(e.landed_indices(ticket.key)) == BLOCKS)
    assert all(bench.content(blocks[i]) == expected(writer, i) for i in range(BLOCKS))


def test_batches_of_one_ticket_add_up(bench: Bench) -> None:
    writer = bench.writer()
    ticket = bench.ticket(range(20))
    for first in range(0, 20, 4):
        writer.write(ticket, moves(ticket, range(first, first + 4)))
    bench.events.wait(lambda e: len(e.landed_indices(ticket.key)) == 20)


def test_nothing_to_write_is_written_at_once(bench: Bench) -> None:
    writer = bench.writer()
    ticket = bench.ticket([3])
    assert writer.write(ticket, []).bytes == 0


@pytest.mark.parametrize(
    ("what", "why"),
    [
        ("token", "token"),
        ("generation", "generation"),
        ("key", "no such grant"),
        ("blocks", "block"),
        ("cached", "block"),
    ],
)
def test_a_forged_ticket_places_no_byte(bench: Bench, what: str, why: str) -> None:
    writer = bench.writer()
    ticket = bench.ticket([5, 6, 7], cached=1, generation=4)
    forged = {
        "token": replace(ticket, write_token=b"x" * 16),
        "generation": replace(ticket, generation=3),
        "key": replace(ticket, key=replace(ticket.key, handoff=2)),
        "blocks": replace(ticket, blocks=(5, 6, 8)),
        "cached": replace(ticket, cached_blocks=0),
    }[what]
    with pytest.raises(WriteRefused, match=why):
        writer.write(forged, moves(forged, list(forged.writable)))
    assert all(bench.content(block) == ZERO for block in range(BLOCKS))
    assert bench.events.landings == []
    bench.events.wait(lambda e: len(e.refusals) == 1)
    writer.write(ticket, moves(ticket, [1, 2]))  # the channel is still good
    bench.events.wait(lambda e: e.landed_indices(ticket.key) == {1, 2})


@pytest.mark.parametrize("move", [BlockMove(0, 5, 0), BlockMove(0, 7, 1), BlockMove(0, 9, 7)])
def test_a_move_outside_its_ticket_is_refused(bench: Bench, move: BlockMove) -> None:
    writer = bench.writer()
    ticket = bench.ticket([5, 6, 7], cached=1)
    with pytest.raises(WriteRefused, match="may not go"):
        writer.write(ticket, [move])
    assert all(bench.content(block) == ZERO for block in range(BLOCKS))


def test_a_write_after_a_revoke_is_told_from_a_wrong_one(bench: Bench) -> None:
    """A cancel that overtakes a write is no alarm on either side; the channel stays good."""
    writer = bench.writer()
    ticket, other = bench.ticket(range(4)), bench.ticket(range(4, 8))
    writer.write(ticket, moves(ticket, [0]))
    bench.receiver.revoke(ticket.key)
    with pytest.raises(WriteRevoked):
        writer.write(ticket, moves(ticket, [1]))
    with pytest.raises(WriteRefused) as wrong:
        writer.write(replace(other, write_token=b"x" * 16), moves(other, [0]))
    assert type(wrong.value) is WriteRefused
    bench.events.wait(lambda e: len(e.refusals) == 2)
    assert [why in OVER for _, why in bench.events.refusals] == [True, False]
    assert writer.write(other, moves(other, [0])).bytes


def test_after_a_revoke_nothing_counts(bench: Bench) -> None:
    writer = bench.writer()
    ticket = bench.ticket(range(8))
    writer.write(ticket, moves(ticket, [0, 1]))
    bench.receiver.revoke(ticket.key)
    if bench.receiver.revoke_proves:
        bench.events.wait(lambda e: e.revocations == [ticket.key])
    with pytest.raises((WriteRefused, PeerClosed)):
        writer.write(ticket, moves(ticket, [2, 3]))
    assert bench.events.landed_indices(ticket.key) == {0, 1}
    if bench.receiver.revoke_proves:
        assert bench.content(2) == ZERO


def test_revoking_what_is_unknown_is_proof_too(bench: Bench) -> None:
    ticket = bench.ticket([1])
    bench.receiver.revoke(ticket.key)
    bench.receiver.revoke(ticket.key)
    if bench.receiver.revoke_proves:
        bench.events.wait(lambda e: e.revocations == [ticket.key] * 2)


def _prove(bench: Bench, ticket: Ticket) -> None:
    bench.receiver.revoke(ticket.key)
    if bench.receiver.revoke_proves:
        bench.events.wait(lambda e: ticket.key in e.revocations)
    else:
        bench.events.wait(lambda e: ticket.writer in e.gone)


def test_no_byte_changes_after_the_proof(bench: Bench) -> None:
    """A writer that writes without pause is revoked, in the middle of whatever it does."""
    writer = bench.writer()
    ticket = bench.ticket(range(BLOCKS))
    writer.hammer(ticket, moves(ticket, range(BLOCKS)))
    bench.events.wait(lambda e: len(e.landings) >= 2)
    if not bench.receiver.revoke_proves:
        writer.kill()
    _prove(bench, ticket)
    for block in range(BLOCKS):
        bench.memory.block(block)[:] = ZERO
    writer.hammered()
    assert all(bench.content(block) == ZERO for block in range(BLOCKS))


def test_a_killed_writer_is_proven_gone(bench: Bench) -> None:
    writer, other = bench.writer(), bench.writer("other")
    ticket = bench.ticket(range(BLOCKS))
    writer.hammer(ticket, moves(ticket, range(BLOCKS)))
    bench.events.wait(lambda e: len(e.landings) >= 1)
    writer.kill()
    _prove(bench, ticket)
    assert "other" not in bench.events.gone
    second = bench.ticket(range(4), writer="other")
    other.write(second, moves(second, range(4)))
    bench.events.wait(lambda e: e.landed_indices(second.key) == {0, 1, 2, 3})


def test_two_pairs_at_once_do_not_mix(bench: Bench) -> None:
    writers = [bench.writer("one"), bench.writer("two")]
    tickets = [bench.ticket(range(w, BLOCKS, 2), writer=writer.incarnation) for w, writer in enumerate(writers)]
    with ThreadPoolExecutor(2) as threads:
        for _ in range(5):
            runs = [
                threads.submit(writer.write, ticket, moves(ticket, range(BLOCKS // 2)))
                for writer, ticket in zip(writers, tickets, strict=True)
            ]
            assert [run.result(60).bytes for run in runs] == [BLOCKS // 2 * LAYOUT.block_bytes] * 2
    for writer, ticket in zip(writers, tickets, strict=True):
        assert all(bench.content(ticket.blocks[i]) == expected(writer, i) for i in range(BLOCKS // 2))


def test_a_silent_receiver_ends_at_the_deadline(bench: Bench) -> None:
    writer = bench.writer()
    ticket = bench.ticket(range(4))
    bench.stall(writer)
    started = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        writer.write(ticket, moves(ticket, range(4)), seconds=0.5)
    assert 0.4 < time.monotonic() - started < 30
    with pytest.raises((PeerClosed, DeadlineExceeded)):  # an answer may still be on the way, so it is of no more use
        writer.write(ticket, moves(ticket, range(4)), seconds=0.2)


def test_a_receiver_that_leaves_ends_the_write(bench: Bench) -> None:
    writer = bench.writer()
    ticket = bench.ticket(range(4))
    bench.receiver.close()
    bench.receiver.close()
    with pytest.raises(PeerClosed):
        writer.write(ticket, moves(ticket, range(4)))
    with pytest.raises(PeerClosed):
        writer.connect(bench.receiver.endpoint())


def test_an_address_that_leads_to_another_receiver_is_noticed(bench: Bench) -> None:
    """As a wrong `--tcp-advertise` does. Where an address has no token, it is one itself: it can't be another's."""
    writer, other = bench.writer(), bench.beside()
    meant, there = bench.receiver.endpoint(), other.endpoint()
    assert meant != there
    address, _, token = there.partition("#")
    if token:
        writer.connect(there)
        for wrong in (f"{address}#{meant.partition('#')[2]}", address, f"{address}#00"):
            with pytest.raises(PeerClosed, match=r"another receiver answers|malformed token"):
                writer.connect(wrong)
    else:
        with pytest.raises(PeerClosed):
            writer.connect(meant[:-1])
    writer.connect(meant)
    ticket = bench.ticket(range(4))
    writer.write(ticket, moves(ticket, range(4)))
    assert len(bench.events.landings) == 1
    assert bench.events.refusals == []


def test_many_threads_admit_and_revoke(bench: Bench) -> None:
    writer = bench.writer()
    stop = threading.Event()

    def churn() -> None:
        while not stop.is_set():
            bench.receiver.revoke(bench.ticket([0]).key)

    with ThreadPoolExecutor(2) as threads:
        churning = [threads.submit(churn) for _ in range(2)]
        ticket = bench.ticket(range(8, 16))
        for _ in range(20):
            writer.write(ticket, moves(ticket, range(8)))
        stop.set()
        assert [run.result(60) for run in churning] == [None, None]
    assert all(bench.content(8 + i) == expected(writer, i) for i in range(8))
