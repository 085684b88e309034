from __future__ import annotations

import itertools

import pytest

from baton.spec import HandoffKey, RefusalReason
from kvtransfer.blocks.pool import BlockPool
from kvtransfer.handoffs.grants import GrantLedger
from kvtransfer.handoffs.messages import Aborted, Grant, Refusal
from kvtransfer.handoffs.outcomes import GrantState, LedgerLimits, LedgerOutcome

ATTEMPT = bytes(16)
KEY = HandoffKey(ATTEMPT, 1)
NEXT = HandoffKey(ATTEMPT, 2)
DIGESTS = [bytes([n]) * 16 for n in range(8)]
LIMITS = LedgerLimits(lease_s=10, handoff_s=60, tombstone_s=60, tombstones=100)


class Desk:
    """A ledger, its pool, and what it gave up."""

    def __init__(self, blocks: int = 16, limits: LedgerLimits = LIMITS) -> None:
        self.pool = BlockPool(blocks)
        self.aborted: list[Aborted] = []
        tokens = itertools.count()
        self.ledger = GrantLedger(self.pool, limits, self.aborted.append, lambda: next(tokens).to_bytes(16, "little"))

    def open(
        self, key: HandoffKey = KEY, prompt: int = 4, total: int = 6, now: float = 0.0, writer: str = "w"
    ) -> Grant:
        grant = self.ledger.open(key, writer, DIGESTS[: prompt - 1], prompt, total, now)
        assert isinstance(grant, Grant), grant
        return grant

    def refused(self, key: HandoffKey = KEY, now: float = 0.0, total: int = 6, writer: str = "w") -> Refusal:
        refusal = self.ledger.open(key, writer, (), 1, total, now)
        assert isinstance(refusal, Refusal)
        assert refusal.key == key
        return refusal

    def resident(self, key: HandoffKey = KEY, now: float = 0.0) -> Grant:
        grant = self.open(key, now=now)
        self.ledger.landed(key, grant.generation, grant.ticket.writable)
        assert self.ledger.commit(key, grant.generation, len(grant.ticket.writable), "t") is LedgerOutcome.RESIDENT
        return grant

    def conserved(self, quarantined: int = 0, held: int = 0) -> None:
        self.ledger.check_integrity()
        state = self.pool.statistics()
        assert (state.quarantined, state.held) == (quarantined, held)


def test_an_open_reserves_the_whole_sequence_and_repeats_itself() -> None:
    desk = Desk()
    grant = desk.open()
    assert len(grant.ticket.blocks) == 4
    assert len(grant.growth) == 2
    assert len(set(grant.table)) == 6
    assert desk.open() is grant
    assert desk.open(now=5.0) is grant
    desk.conserved(held=6)


def test_resident_once_whatever_comes_first() -> None:
    for commit_first in (True, False):
        desk = Desk()
        grant = desk.open()
        g = grant.generation
        first, rest = [0, 1], [2, 3]
        assert desk.ledger.landed(KEY, g, first) is LedgerOutcome.PENDING
        if commit_first:
            assert desk.ledger.commit(KEY, g, 4, "token") is LedgerOutcome.PENDING
            assert desk.ledger.commit(KEY, g, 4, "other") is LedgerOutcome.PENDING
            assert desk.ledger.landed(KEY, g, first) is LedgerOutcome.PENDING
            assert desk.pool.peek(DIGESTS) == 0, "nothing is findable before it is resident"
            assert desk.ledger.landed(KEY, g, rest) is LedgerOutcome.RESIDENT
        else:
            assert desk.ledger.landed(KEY, g, rest) is LedgerOutcome.PENDING
            assert desk.ledger.commit(KEY, g, 4, "token") is LedgerOutcome.RESIDENT
        assert desk.ledger.commit(KEY, g, 4, "other") is LedgerOutcome.ALREADY
        assert desk.ledger.landed(KEY, g, rest) is LedgerOutcome.ALREADY
        assert desk.ledger.payload(KEY) == "token"
        assert desk.pool.peek(DIGESTS) == 3


def test_wrong_generation_changes_nothing() -> None:
    desk = Desk()
    grant = desk.open()
    assert desk.ledger.landed(KEY, grant.generation + 1, range(4)) is LedgerOutcome.IGNORED
    assert desk.ledger.commit(KEY, grant.generation - 1, 4, "t") is LedgerOutcome.IGNORED
    assert desk.ledger.state(KEY) is GrantState.GRANTED
    assert desk.ledger.counts.snapshot()["grant_landed_wrong_generation"] == 1
    assert desk.ledger.counts.snapshot()["grant_commit_wrong_generation"] == 1


def test_what_contradicts_the_grant_is_a_conflict() -> None:
    desk = Desk()
    grant = desk.open()
    assert desk.ledger.landed(KEY, grant.generation, [4]) is LedgerOutcome.CONFLICT
    assert desk.ledger.commit(KEY, grant.generation, 3, "t") is LedgerOutcome.CONFLICT
    assert desk.ledger.state(KEY) is GrantState.GRANTED


def test_a_second_turn_writes_only_what_is_new() -> None:
    desk = Desk()
    desk.resident()
    assert desk.ledger.release(KEY, 1.0, DIGESTS[:5])  # output filled more blocks
    assert desk.pool.statistics().cached == 5
    other = HandoffKey(bytes([1]) * 16, 1)
    grant = desk.open(other, prompt=7, total=8, now=2.0)
    assert grant.ticket.cached_blocks == 5
    assert list(grant.ticket.writable) == [5, 6]
    desk.ledger.abort(other, RefusalReason.EXPIRED, 3.0)
    desk.conserved(quarantined=2)
    assert desk.pool.peek(DIGESTS) == 5, "matched blocks are never quarantined"


def test_a_full_hit_needs_only_the_commit() -> None:
    desk = Desk()
    desk.resident()
    other = HandoffKey(bytes([1]) * 16, 1)
    grant = desk.ledger.open(other, "w", DIGESTS[:3], 3, 4, 0.0)
    assert isinstance(grant, Grant)
    assert list(grant.ticket.writable) == []
    assert desk.ledger.commit(other, grant.generation, 0, "t") is LedgerOutcome.RESIDENT


def test_abort_frees_what_is_proven_and_quarantines_the_rest() -> None:
    desk = Desk()
    grant = desk.open()
    desk.ledger.landed(KEY, grant.generation, [0, 1])
    assert desk.ledger.abort(KEY, RefusalReason.EXPIRED, 1.0)
    desk.conserved(quarantined=4)
    assert not desk.ledger.abort(KEY, RefusalReason.EXPIRED, 1.0)
    assert [(a.grant, a.proven) for a in desk.aborted] == [(grant, False)]
    assert desk.ledger.landed(KEY, grant.generation, [2, 3]) is LedgerOutcome.IGNORED
    assert desk.ledger.commit(KEY, grant.generation, 4, "t") is LedgerOutcome.IGNORED
    desk.ledger.expire(1e9)
    desk.conserved(quarantined=4)  # time is never proof
    assert desk.refused(now=2e9).reason is RefusalReason.EXPIRED
    assert desk.ledger.proved(KEY)
    assert not desk.ledger.proved(KEY)
    desk.conserved()


@pytest.mark.parametrize("proof", [True, False])
def test_closed_is_proof_only_where_the_writers_word_is(proof: bool) -> None:
    desk = Desk()
    desk.open()
    assert desk.ledger.closed(KEY, 1.0, proof)
    desk.conserved(quarantined=0 if proof else 4)
    assert not desk.ledger.closed(KEY, 1.0, proof)
    assert desk.ledger.proved(KEY) == (not proof)
    desk.conserved()


def test_a_proof_touches_nothing_that_was_not_given_up() -> None:
    """Every resident's ticket is revoked too, so its `revoked` comes for a sequence that lives."""
    desk = Desk()
    desk.open()
    assert not desk.ledger.proved(KEY)
    assert desk.ledger.state(KEY) is GrantState.GRANTED
    other = HandoffKey(bytes([1]) * 16, 1)
    desk.resident(other)
    assert not desk.ledger.proved(other)
    assert not desk.ledger.closed(other, 0.0, proof=True)
    assert desk.ledger.state(other) is GrantState.RESIDENT
    desk.conserved(held=12)
    assert desk.ledger.counts.snapshot()["grant_proof_late"] == 3


def test_the_writers_end_is_proof_and_spares_residents() -> None:
    desk = Desk()
    keys = [HandoffKey(bytes([n]) * 16, 1) for n in range(3)]
    desk.resident(keys[0])
    desk.open(keys[1], prompt=3, total=3)
    desk.open(keys[2], prompt=3, total=3)
    desk.ledger.abort(keys[1], RefusalReason.CANCELLED, 0)
    desk.ledger.writer_gone("w", 1.0)
    desk.ledger.writer_gone("w", 1.0)
    desk.conserved(held=6)
    assert desk.ledger.state(keys[0]) is GrantState.RESIDENT
    assert desk.aborted[-1].proven
    assert desk.refused(HandoffKey(bytes([9]) * 16, 1), 2.0).reason is RefusalReason.EXPIRED
    assert desk.ledger.statistics().writers == 0


def test_a_newer_handoff_replaces_the_older_and_never_the_reverse() -> None:
    desk = Desk()
    old = desk.open()
    new = desk.open(NEXT)
    assert new.generation > old.generation
    assert set(new.ticket.blocks).isdisjoint(old.written)
    assert desk.ledger.state(KEY) is GrantState.ABORTING
    assert desk.refused(KEY).reason is RefusalReason.EXPIRED
    assert desk.ledger.commit(KEY, old.generation, 4, "t") is LedgerOutcome.IGNORED
    desk.ledger.proved(KEY)
    assert desk.refused(KEY).reason is RefusalReason.EXPIRED
    desk.conserved(held=6)


def test_a_resident_is_not_replaced() -> None:
    desk = Desk()
    desk.resident()
    assert "resident" in desk.refused(NEXT).message
    assert desk.ledger.state(KEY) is GrantState.RESIDENT
    desk.ledger.release(KEY, 1.0)
    assert desk.refused(KEY, 2.0).reason is RefusalReason.EXPIRED


def test_another_sender_does_not_get_the_grant() -> None:
    desk = Desk()
    desk.open(writer="w")
    assert desk.refused(writer="v").reason is RefusalReason.EXPIRED


def test_refusals_say_why_and_are_repeated() -> None:
    desk = Desk(blocks=8)
    assert desk.refused(total=9).reason is RefusalReason.TOO_LARGE
    holder = desk.open(HandoffKey(bytes([1]) * 16, 1), total=6)
    crowded = HandoffKey(bytes([2]) * 16, 1)
    refusal = desk.refused(crowded, total=3)
    assert refusal.reason is RefusalReason.NO_CAPACITY
    assert refusal.retry_after_s == LIMITS.retry_after_s
    desk.ledger.closed(holder.key, 1.0, proof=True)
    assert desk.refused(crowded, 1.0, total=3) is refusal, "a duplicate is answered like the first"
    late = desk.ledger.open(HandoffKey(bytes([3]) * 16, 1), "w", (), 1, 1, 5.0, deadline=5.0)
    assert isinstance(late, Refusal)
    assert late.reason is RefusalReason.EXPIRED
    desk.conserved()


def test_a_cancel_outruns_the_open() -> None:
    desk = Desk()
    assert desk.ledger.cancel(ATTEMPT, 0.0).resident is None
    assert desk.refused().reason is RefusalReason.CANCELLED
    assert desk.refused(NEXT, 59.0).reason is RefusalReason.CANCELLED
    desk.ledger.expire(60.0)
    assert desk.ledger.statistics().tombstones == 0


def test_a_cancel_gives_up_a_grant_and_names_a_resident() -> None:
    desk = Desk()
    desk.open()
    assert desk.ledger.cancel(ATTEMPT, 0.0).aborted
    assert not desk.ledger.cancel(ATTEMPT, 0.0).aborted
    desk.ledger.proved(KEY)
    other = HandoffKey(bytes([1]) * 16, 1)
    grant = desk.resident(other)
    assert desk.ledger.cancel(other.attempt, 1.0).resident is grant
    desk.ledger.expire(1000.0)
    assert desk.ledger.release(other, 1000.0)
    again = HandoffKey(other.attempt, 2)
    assert desk.refused(again, 1001.0).reason is RefusalReason.CANCELLED
    desk.conserved()


def test_a_silent_writer_loses_all_its_grants() -> None:
    desk = Desk()
    other = HandoffKey(bytes([1]) * 16, 1)
    desk.open(now=0.0)
    desk.open(other, prompt=2, total=2, now=4.0, writer="v")
    assert desk.ledger.writers.renew("w", 9.0)
    desk.ledger.expire(14.0)
    assert [a.grant.key for a in desk.aborted] == [other]
    desk.ledger.expire(19.0)
    assert [a.grant.key for a in desk.aborted] == [other, KEY]
    assert not desk.ledger.writers.renew("w", 19.0)


def test_a_handoff_ends_though_its_writer_renews_for_ever() -> None:
    desk = Desk()
    desk.open()
    for now in range(0, 60, 5):
        desk.ledger.writers.renew("w", float(now))
        desk.ledger.expire(float(now))
    assert desk.ledger.state(KEY) is GrantState.GRANTED
    desk.ledger.expire(60.0)
    assert desk.ledger.state(KEY) is GrantState.ABORTING
    desk.conserved(quarantined=4)


def test_tombstones_are_bounded() -> None:
    desk = Desk(limits=LedgerLimits(tombstones=10))
    for n in range(50):
        desk.ledger.cancel(n.to_bytes(16, "little"), float(n) / 10)
    assert desk.ledger.statistics().tombstones == 10


@pytest.mark.parametrize("field", ["lease_s", "handoff_s", "tombstones", "retry_after_s"])
def test_limits_are_checked(field: str) -> None:
    with pytest.raises(ValueError, match=field):
        LedgerLimits(**{field: 0})
    with pytest.raises(ValueError, match="tombstone_s"):
        LedgerLimits(tombstone_s=1)
