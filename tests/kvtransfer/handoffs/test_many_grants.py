"""100,000 grants with random aborts, restarts, lease extensions, late proofs and repeated messages.

Throughout: the books balance, and no block is granted that a writer may still write. Afterwards: nothing is left, and
the ledger is no bigger than it was after the first tenth.
"""

from __future__ import annotations

import gc
import random
import sys

from baton.spec import HandoffKey, RefusalReason
from kvtransfer.blocks.pool import BlockPool
from kvtransfer.handoffs.grants import GrantLedger
from kvtransfer.handoffs.messages import Grant
from kvtransfer.handoffs.outcomes import GrantState, LedgerLimits, LedgerOutcome

GRANTS = 100_000
WARM = 10_000
BLOCKS, WRITERS = 96, 4
FAMILIES = [[bytes([family, n]) * 8 for n in range(3)] for family in range(4)]
REASONS = list(RefusalReason)


class Traffic:
    """What four prefill workers and their network do to one ledger, at random."""

    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)
        self.now = 0.0
        self.pool = BlockPool(BLOCKS)
        limits = LedgerLimits(lease_s=5, handoff_s=8, tombstone_s=10, tombstones=500)
        self.ledger = GrantLedger(self.pool, limits, lambda aborted: self.unproven.append(aborted.grant))
        self.restarts = [0] * WRITERS
        self.live: list[Grant] = []
        self.residents: list[HandoffKey] = []
        self.unproven: list[Grant] = []
        self.writers_of: dict[int, HandoffKey] = {}  # by block: the handoff that may write it
        self.granted = self.resident = 0

    def writer(self, number: int) -> str:
        return f"w{number}-{self.restarts[number]}"

    def turn(self) -> None:
        """A little time passes, and something happens."""
        self.now += self.dice.random() * 0.05
        self.open(self.dice.randrange(WRITERS))
        if self.dice.random() < 0.7:
            self.ledger.writers.renew(self.writer(self.dice.randrange(WRITERS)), self.now)
        self.ledger.expire(self.now)
        for _ in range(self.dice.randrange(3)):
            if self.live:
                self.settle(self.live[self.dice.randrange(len(self.live))])
        while len(self.residents) > 4:
            self.end(self.residents.pop(self.dice.randrange(len(self.residents))))
        while self.unproven and (len(self.unproven) > 6 or self.dice.random() < 0.4):
            self.prove(self.unproven.pop(self.dice.randrange(len(self.unproven))))
        if self.dice.random() < 0.001:
            self.restart(self.dice.randrange(WRITERS))

    def open(self, number: int) -> None:
        prompt = self.dice.randint(1, 4)
        digests = self.dice.choice(FAMILIES)[: prompt - 1] if self.dice.random() < 0.5 else ()
        key = HandoffKey(self.dice.randbytes(16), self.dice.randint(1, 2))
        answer = self.ledger.open(key, self.writer(number), digests, prompt, prompt + 1, self.now)
        if not isinstance(answer, Grant):
            assert answer.reason is RefusalReason.NO_CAPACITY
            return
        assert self.ledger.open(key, self.writer(number), digests, prompt, prompt + 1, self.now) is answer
        for block in answer.table[answer.ticket.cached_blocks :]:
            assert block not in self.writers_of, "granted while a writer may write it"
        self.writers_of |= dict.fromkeys(answer.written, key)
        self.live.append(answer)
        self.granted += 1

    def settle(self, grant: Grant) -> None:
        """It arrives, perhaps in part, or comes to nothing."""
        key, fate = grant.key, self.dice.random()
        if fate < 0.1:
            self.ledger.abort(key, self.dice.choice(REASONS), self.now)
        elif fate < 0.2:
            self.ledger.cancel(key.attempt, self.now)
        elif fate < 0.4:
            self.ledger.landed(key, grant.generation, grant.ticket.writable[:1])
            self.ledger.landed(key, grant.generation + 1, grant.ticket.writable)  # of another grant
            return
        else:
            self.ledger.landed(key, grant.generation, grant.ticket.writable)
            outcome = self.ledger.commit(key, grant.generation, len(grant.ticket.writable), None)
            if outcome is LedgerOutcome.RESIDENT:
                self.resident += 1
                self.residents.append(key)
                self.let_go(grant)
        self.live.remove(grant)

    def end(self, key: HandoffKey) -> None:
        assert self.ledger.release(key, self.now)
        assert not self.ledger.release(key, self.now)

    def prove(self, grant: Grant) -> None:
        """It writes no more; it may have come out otherwise too."""
        self.let_go(grant)
        self.ledger.proved(grant.key)
        assert self.ledger.state(grant.key) is None

    def restart(self, number: int) -> None:
        gone = self.writer(number)
        self.restarts[number] += 1
        for grant in [*self.live, *self.unproven]:
            if grant.writer == gone and self.ledger.state(grant.key) is not GrantState.RESIDENT:
                self.let_go(grant)
        self.ledger.writer_gone(gone, self.now)

    def let_go(self, grant: Grant) -> None:
        for block in grant.written:
            if self.writers_of.get(block) == grant.key:
                del self.writers_of[block]

    def check(self) -> None:
        self.ledger.check_integrity()
        assert self.ledger.statistics().tombstones <= 500
        for block, key in self.writers_of.items():
            held = self.ledger.state(key)
            assert held is not None, "forgotten without proof"
            assert self.pool.quarantined(block) == (held is GrantState.ABORTING)

    def finish(self) -> None:
        """All end; nothing may be left."""
        for number in range(WRITERS):
            self.restart(number)
        for key in self.residents:
            self.end(key)
        self.now += 1e6
        self.ledger.expire(self.now)
        self.ledger.check_integrity()
        assert self.pool.available == BLOCKS
        left = self.ledger.statistics()
        assert (left.tombstones, left.writers, left.quarantined_blocks, left.resident) == (0, 0, 0, 0)


def allocated() -> int:
    gc.collect()
    return sys.getallocatedblocks()


def test_a_hundred_thousand_grants_leave_nothing_behind() -> None:
    traffic, warm, turns = Traffic(7), 0, 0
    while traffic.granted < GRANTS:
        traffic.turn()
        turns += 1
        if turns % 50 == 0:
            traffic.check()
        if not warm and traffic.granted >= WARM:
            warm = allocated()
    growth = allocated() - warm
    print(f"{traffic.granted} grants, {traffic.resident} resident, {sum(traffic.restarts)} restarts, growth {growth}")
    assert growth < 0.01 * warm, f"{growth} objects more than the {warm} after {WARM} grants"
    assert traffic.resident > GRANTS / 4
    assert (
        min(
            traffic.ledger.counts.snapshot()[f"grant_abort_{reason}"]
            for reason in ("expired", "cancelled", "unreachable")
        )
        > 100
    )
    traffic.finish()
