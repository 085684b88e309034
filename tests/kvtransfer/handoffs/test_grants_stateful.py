"""Random histories of the ledger, with duplicated, late and reordered messages.

Throughout: no block that a writer may still write is free, cached or granted to another, and the books add up.
"""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from baton.spec import HandoffKey, RefusalReason
from kvtransfer.blocks.pool import BlockPool
from kvtransfer.handoffs.grants import GrantLedger
from kvtransfer.handoffs.messages import Aborted, Grant, Ticket
from kvtransfer.handoffs.outcomes import GrantState, LedgerLimits, LedgerOutcome

BLOCKS = 24
FAMILIES = [[bytes([family, n]) * 8 for n in range(6)] for family in range(2)]
attempts = st.integers(0, 3).map(lambda n: bytes([n]) * 16)
keys = st.builds(HandoffKey, attempts, st.integers(1, 4))
writers = st.integers(0, 1)


class LedgerMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.pool = BlockPool(BLOCKS)
        limits = LedgerLimits(lease_s=5, handoff_s=20, tombstone_s=20, tombstones=50)
        self.ledger = GrantLedger(self.pool, limits, self.on_abort)
        self.writable: dict[HandoffKey, Ticket] = {}  # what a correct or frozen writer may still write
        self.seen: list[Grant] = []
        self.residents: list[HandoffKey] = []
        self.aborted: list[HandoffKey] = []
        self.incarnations = ["w0-0", "w1-0"]

    def on_abort(self, aborted: Aborted) -> None:
        assert aborted.grant.key not in self.residents
        self.aborted.append(aborted.grant.key)

    @rule(key=keys, writer=writers, family=st.integers(0, 1), prompt=st.integers(1, 6), growth=st.integers(0, 3))
    def open(self, key: HandoffKey, writer: int, family: int, prompt: int, growth: int) -> None:
        known = self.ledger.grant(key)
        name = self.incarnations[writer]
        answer = self.ledger.open(key, name, FAMILIES[family][:prompt], prompt, prompt + growth, self.now)
        if isinstance(answer, Grant):
            assert known is None or answer is known
            assert key not in self.residents or known is answer
            if known is None:
                assert not any(grant.generation == answer.generation for grant in self.seen)
                self.seen.append(answer)
                self.writable[key] = answer.ticket

    @precondition(lambda self: self.seen)
    @rule(data=st.data(), indices=st.sets(st.integers(0, 6)), off=st.integers(0, 3))
    def landed(self, data: st.DataObject, indices: set[int], off: int) -> None:
        grant = data.draw(st.sampled_from(self.seen))
        generation = grant.generation + (off == 3)
        before = self.snapshot()
        outcome = self.ledger.landed(grant.key, generation, indices)
        self.judge(grant, outcome, before)

    @precondition(lambda self: self.seen)
    @rule(data=st.data(), all_landed=st.booleans())
    def commit(self, data: st.DataObject, all_landed: bool) -> None:
        grant = data.draw(st.sampled_from(self.seen))
        if all_landed:
            self.judge(
                grant,
                self.ledger.landed(grant.key, grant.generation, grant.ticket.writable),
                self.snapshot(),
            )
        before = self.snapshot()
        outcome = self.ledger.commit(grant.key, grant.generation, len(grant.ticket.writable), "t")
        self.judge(grant, outcome, before)

    def judge(self, grant: Grant, outcome: LedgerOutcome, before: object) -> None:
        key = grant.key
        if outcome is LedgerOutcome.RESIDENT:
            assert key not in self.residents
            assert self.ledger.grant(key) is grant
            self.residents.append(key)
            del self.writable[key]  # it has written everything
        elif outcome in (LedgerOutcome.ALREADY, LedgerOutcome.IGNORED, LedgerOutcome.CONFLICT):
            assert self.snapshot() == before, "a late or wrong message changed something"
        if outcome is LedgerOutcome.ALREADY:
            assert key in self.residents

    @precondition(lambda self: self.seen)
    @rule(data=st.data(), proof=st.booleans())
    def closed(self, data: st.DataObject, proof: bool) -> None:
        key = data.draw(st.sampled_from(self.seen)).key
        self.ledger.closed(key, self.now, proof)
        if proof:
            self.writable.pop(key, None)

    @precondition(lambda self: self.aborted)
    @rule(data=st.data())
    def proved(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(self.aborted))
        if self.ledger.state(key) is GrantState.ABORTING:
            self.writable.pop(key, None)
        self.ledger.proved(key)

    @precondition(lambda self: self.seen)
    @rule(data=st.data(), reason=st.sampled_from(RefusalReason))
    def abort(self, data: st.DataObject, reason: RefusalReason) -> None:
        self.ledger.abort(data.draw(st.sampled_from(self.seen)).key, reason, self.now)

    @rule(attempt=attempts)
    def cancel(self, attempt: bytes) -> None:
        cancelled = self.ledger.cancel(attempt, self.now)
        assert cancelled.resident is None or self.ledger.state(cancelled.resident.key) is GrantState.RESIDENT

    @rule(writer=writers, restart=st.booleans())
    def writer_gone(self, writer: int, restart: bool) -> None:
        name = self.incarnations[writer]
        self.writable = {key: ticket for key, ticket in self.writable.items() if ticket.writer != name}
        self.ledger.writer_gone(name, self.now)
        if restart:
            number = int(name.split("-")[1])
            self.incarnations[writer] = f"w{writer}-{number + 1}"

    @rule(writer=writers)
    def renew(self, writer: int) -> None:
        self.ledger.writers.renew(self.incarnations[writer], self.now)

    @rule(seconds=st.integers(0, 8))
    def pass_time(self, seconds: int) -> None:
        self.now += seconds
        self.ledger.expire(self.now)

    @precondition(lambda self: self.residents)
    @rule(data=st.data(), count=st.integers(1, 6))
    def grow(self, data: st.DataObject, count: int) -> None:
        key = data.draw(st.sampled_from(self.residents))
        room, table = self.pool.available, list(self.ledger.table(key))
        grown = self.ledger.grow(key, count)
        assert (grown is None) == (count > room)
        assert self.ledger.table(key) == [*table, *(grown or ())]

    @precondition(lambda self: self.residents)
    @rule(data=st.data(), family=st.integers(0, 1))
    def release(self, data: st.DataObject, family: int) -> None:
        key = data.draw(st.sampled_from(self.residents))
        live = self.ledger.state(key) is GrantState.RESIDENT
        assert self.ledger.release(key, self.now) == live
        assert not self.ledger.release(key, self.now)
        # once the attempt is forgotten its key may in principle come back; the router never reuses one
        self.residents = [resident for resident in self.residents if resident != key]

    def snapshot(self) -> object:
        states = {grant.key: self.ledger.state(grant.key) for grant in self.seen}
        return self.pool.statistics(), states

    @invariant()
    def books_add_up(self) -> None:
        self.ledger.check_integrity()

    @invariant()
    def what_may_still_be_written_is_granted_to_no_other(self) -> None:
        taken: set[int] = set()
        for key, ticket in self.writable.items():
            blocks = set(ticket.blocks[ticket.cached_blocks :])
            if not blocks:
                continue  # all cached: there is nothing to write, and so nothing to prove
            assert not blocks & taken, "two writers may write one block"
            taken |= blocks
            state = self.ledger.state(key)
            assert state is not None, "a grant was forgotten without proof"
            if state is GrantState.ABORTING:
                assert all(self.pool.quarantined(block) for block in blocks)
            else:
                assert all(self.pool.holds(block) == 1 for block in blocks)

    def teardown(self) -> None:
        for name in {grant.writer for grant in self.seen}:
            self.ledger.writer_gone(name, self.now)
        for key in self.residents:
            self.ledger.release(key, self.now)
        self.ledger.check_integrity()
        assert self.pool.available == BLOCKS, "a block is lost"


TestLedgerMachine = LedgerMachine.TestCase
TestLedgerMachine.settings = settings(max_examples=120, stateful_step_count=50, deadline=None)
