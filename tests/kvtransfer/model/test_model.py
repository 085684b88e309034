"""The protocol explored: whatever the adversary does, no block is reused while it may be written, and all ends."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest

from baton.spec import HandoffKey, RefusalReason
from kvtransfer.handoffs.delivery import Delivery
from kvtransfer.handoffs.grants import GrantLedger
from kvtransfer.handoffs.outcomes import LedgerEntry, LedgerOutcome
from tests.kvtransfer.model.explorer import Explorer, Found
from tests.kvtransfer.model.state import Action, Case
from tests.kvtransfer.model.world import World

ONE = ((0, 2, 1, 0),)
"""One sequence of two prompt blocks and one of growth."""
TWO = ((0, 2, 0, 0), (1, 2, 0, 1))
"""Two writers, whose sequences do not fit together."""
SAME_PREFIX = ((0, 2, 0, 0), (1, 2, 0, 0))
"""Two writers of the same prompt: what one has brought the other finds in the cache."""
GROWING = ((0, 1, 0, 0), (1, 1, 0, 1))
"""Two writers, whose sequences fit together until they grow."""
BOTH = (True, False)
SMALL: list[tuple[tuple[tuple[int, int, int, int], ...], dict[str, int]]] = [
    (ONE, {"crash": 1}),
    (ONE, {"cancel": 1}),
    (ONE, {"duplicate": 1}),
    (ONE, {"break": 1}),
    (ONE, {"tick": 2}),
    (TWO, {}),
    (SAME_PREFIX, {}),
]
LARGE: list[tuple[tuple[tuple[int, int, int, int], ...], dict[str, int]]] = [
    (ONE, {"crash": 1, "duplicate": 1, "cancel": 1}),
    (ONE, {"tick": 2, "renew": 1, "tear": 1}),
    (ONE, {"break": 1, "tear": 1, "duplicate": 1}),
    (ONE, {"timeout": 1, "cancel": 1}),
    (TWO, {"crash": 1, "duplicate": 1}),
    (TWO, {"break": 1}),
    (TWO, {"tick": 2, "tear": 1}),
    (SAME_PREFIX, {"crash": 1, "cancel": 1}),
]
NIGHT_STATES = 40_000


def explore(case: Case, limit: int = 1_000_000, world: type[World] = World) -> None:
    found = Explorer(case, world, limit).run()
    print(f"{case}: {found}")
    assert found.ends


@pytest.mark.parametrize("closes_prove", BOTH, ids=["shm", "tcp"])
def test_in_small_worlds_no_block_is_reused_too_early_and_all_ends(closes_prove: bool) -> None:
    states = 0
    for attempts, budget in SMALL:
        handoffs = 1 if budget.keys() & {"break", "tick"} else 2
        case = Case(attempts, 3, closes_prove, budget, handoffs=handoffs)
        found = Explorer(case).run()
        assert found.complete
        assert found.ends
        states += found.states
    print(f"{states} states")
    assert states > 1000, "the adversary has lost its hold on the world"


@pytest.mark.parametrize("closes_prove", BOTH, ids=["shm", "tcp"])
def test_residents_that_outgrow_the_pool_all_end(closes_prove: bool) -> None:
    found = Explorer(Case(GROWING, 3, closes_prove, {}, handoffs=1, grows=2)).run()
    print(found)
    assert found.complete
    assert found.ends


@pytest.mark.nightly
@pytest.mark.timeout(600)
@pytest.mark.parametrize("closes_prove", BOTH, ids=["shm", "tcp"])
@pytest.mark.parametrize("budget", [{"cancel": 1}, {"crash": 1}, {"break": 1}, {"tick": 2}], ids=str)
def test_residents_that_outgrow_the_pool_all_end_whatever_happens(budget: dict[str, int], closes_prove: bool) -> None:
    handoffs = 1 if budget.keys() & {"break", "tick"} else 2
    explore(Case(GROWING, 3, closes_prove, budget, handoffs=handoffs, grows=2), NIGHT_STATES)


@pytest.mark.nightly
@pytest.mark.timeout(600)
@pytest.mark.parametrize("closes_prove", BOTH, ids=["shm", "tcp"])
@pytest.mark.parametrize(("attempts", "budget"), LARGE)
def test_in_larger_worlds_no_block_is_reused_too_early_and_all_ends(
    attempts: Any, budget: dict[str, int], closes_prove: bool
) -> None:
    explore(Case(attempts, 3, closes_prove, budget), NIGHT_STATES)


@pytest.mark.nightly
@pytest.mark.timeout(600)
@pytest.mark.parametrize("closes_prove", BOTH, ids=["shm", "tcp"])
def test_the_same_holds_for_three_blocks_while_computing(closes_prove: bool) -> None:
    explore(Case(((0, 3, 0, 0),), 3, closes_prove, {"crash": 1, "tick": 1}, computed=False), NIGHT_STATES)


# Mutants: a checker is worth something if it finds what is wrong. Each breaks one thing that the protocol rests on.


class FreesOnExpiry(GrantLedger):
    """Takes time for a proof."""

    def abort(self, key: HandoffKey, reason: RefusalReason, now: float, message: str = "") -> bool:
        done = super().abort(key, reason, now, message)
        if done and reason is RefusalReason.EXPIRED:
            self.proved(key)
        return done


class ResidentTooEarly(GrantLedger):
    """Takes the commit for the arrival of the data."""

    def _settle(self, entry: LedgerEntry) -> LedgerOutcome:
        if entry.committed:
            entry.missing.clear()
        return super()._settle(entry)


class LosesGrowth(GrantLedger):
    """Forgets the reserved blocks on an abort."""

    def abort(self, key: HandoffKey, reason: RefusalReason, now: float, message: str = "") -> bool:
        known = self._entries.get(key)
        if known is not None and known.grant.growth:
            self.pool.hold(known.grant.growth)
        return super().abort(key, reason, now, message)


class ForgetsWrites(Delivery):
    """Promises that nothing more is written while something is."""

    def take_closed(self) -> list[HandoffKey]:
        held, self._under_way = self._under_way, Counter()
        ready = super().take_closed()
        self._under_way = held
        return ready


class TimeIsProof(World):
    ledger_type = FreesOnExpiry


class CommitIsArrival(World):
    ledger_type = ResidentTooEarly


class GrowthIsLost(World):
    ledger_type = LosesGrowth


class WordIsProof(World):
    """Believes a tcp writer's Close, though its bytes may still be under way."""

    def on_close(self, key: HandoffKey) -> None:
        self.ledger.closed(key, self.now, proof=True)
        self._check_freed(key)


class ClosesTooEarly(World):
    delivery_type = ForgetsWrites


class LosesCloses(World):
    """Never says a Close again that went down with its stream."""

    def lose_closes(self, keys: list[HandoffKey]) -> None:
        pass


class LeavesConnections(World):
    """Reports a revocation without closing connections in the middle of a block."""

    def do_revoke(self, key: HandoffKey) -> None:
        self.wires.revoking.remove(key)
        self.wires.events.append(("revoked", key))


@pytest.mark.parametrize(
    ("mutant", "closes_prove", "budget", "what"),
    [
        (TimeIsProof, True, {"tick": 2}, "granted to it no more"),
        (TimeIsProof, False, {"tick": 2}, "granted to it no more"),
        (CommitIsArrival, True, {}, "holds"),
        (CommitIsArrival, False, {}, "holds"),
        (GrowthIsLost, True, {"cancel": 1}, "never ends"),
        (WordIsProof, False, {"tear": 1}, "granted to it no more"),
        (ClosesTooEarly, True, {"cancel": 1}, "granted to it no more"),
        (LosesCloses, True, {"break": 1}, "never ends"),
        (LeavesConnections, False, {"cancel": 1}, "granted to it no more"),
    ],
)
def test_mutants_are_found(mutant: type[World], closes_prove: bool, budget: dict[str, int], what: str) -> None:
    handoffs = 1 if "break" in budget else 2  # a second one would bring the writer back
    case = Case(ONE, 3, closes_prove, budget, handoffs=handoffs)
    with pytest.raises(Found, match=what) as found:
        Explorer(case, mutant).run()
    assert found.value.trace


class LosesGrown(GrantLedger):
    """Forgets what a resident has taken beyond its grant."""

    def release(self, key: HandoffKey, now: float, digests: Sequence[bytes] = ()) -> bool:
        grant = self.grant(key)
        if grant is not None:
            del self.table(key)[len(grant.table) :]
        return super().release(key, now, digests)


class GrownIsLost(World):
    ledger_type = LosesGrown


class NeverPreempts(World):
    def actions(self) -> list[Action]:
        return [action for action in super().actions() if action[0] != "preempt"]


class PreemptedForItself(World):
    """Lets a preempted sequence go on with what it had."""

    def further(self, key: HandoffKey) -> int:
        return 0


class KeptForThePreempted(World):
    """Keeps what comes free for a sequence that was preempted for it."""

    def grow_stalled(self) -> None:
        if not self.waiting:
            super().grow_stalled()


class OthersGoFirst(World):
    """Lets whoever comes take what a resident is stalled for."""

    def grow_stalled(self) -> None:
        pass

    def may_resume(self) -> bool:
        return True

    def may_grant(self, key: HandoffKey) -> bool:
        return True


@pytest.mark.parametrize(
    ("mutant", "what"),
    [
        (GrownIsLost, "never ends"),
        (NeverPreempts, "never ends"),
        (KeptForThePreempted, "never ends"),
        (OthersGoFirst, "ends|circles"),
        (PreemptedForItself, "circles"),
    ],
)
def test_mutants_of_growth_are_found(mutant: type[World], what: str) -> None:
    with pytest.raises(Found, match=what) as found:
        Explorer(Case(GROWING, 3, True, {}, handoffs=1, grows=2), mutant).run()
    assert found.value.trace
