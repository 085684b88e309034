from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from baton.spec import HandoffKey
from kvtransfer.handoffs.delivery import Delivery, DeliveryState, GrantAnswer
from kvtransfer.handoffs.messages import BlockMove, Ticket

ATTEMPT = bytes(16)
KEY, NEXT = HandoffKey(ATTEMPT, 1), HandoffKey(ATTEMPT, 2)
TOKENS, BLOCK_TOKENS = 40, 16  # three blocks, the last half full


def ticket(key: HandoffKey = KEY, cached: int = 0, blocks: int = 3, generation: int = 1) -> Ticket:
    return Ticket(key, generation, bytes(16), tuple(range(100, 100 + blocks)), cached, "w")


def delivery() -> Delivery:
    return Delivery(KEY, [7, 8, 9], TOKENS, BLOCK_TOKENS)


def held(d: Delivery) -> bool:
    """Whether the source blocks must stay: the handoff goes on, or a write reads them."""
    return d.state not in (DeliveryState.RELEASED, DeliveryState.FAILED) or d.in_flight > 0


def indices(moves: list[BlockMove]) -> list[int]:
    return [move.index for move in moves]


def test_blocks_leave_as_they_complete() -> None:
    d = delivery()
    d.computed(20)
    assert d.take_moves(8) == []
    assert d.granted(ticket()) is GrantAnswer.ACCEPTED
    assert d.take_moves(8) == [BlockMove(7, 100, 0)]
    d.computed(39)
    assert d.take_moves(8) == [BlockMove(8, 101, 1)]
    d.computed(20)  # progress never goes back
    d.computed(40)
    assert d.take_moves(8) == [BlockMove(9, 102, 2)], "the last partial block goes once the prompt is complete"
    assert d.in_flight == 3


def test_cached_blocks_are_skipped_and_limits_kept() -> None:
    d = delivery()
    d.computed(40)
    d.granted(ticket(cached=1))
    assert indices(d.take_moves(1)) == [1]
    assert indices(d.take_moves(1)) == [2]
    d.first_token()
    assert d.take_commit() == 2


def test_a_full_hit_commits_without_a_write() -> None:
    d = delivery()
    d.granted(ticket(cached=3))
    assert d.take_commit() is None
    d.computed(40)
    d.first_token()
    assert d.delivered
    assert d.take_commit() == 0
    assert d.take_commit() is None
    assert d.committed(KEY)
    assert not held(d)


def test_the_source_is_kept_until_committed_and_read() -> None:
    d = delivery()
    d.computed(40)
    d.granted(ticket())
    moves = d.take_moves(8)
    assert not d.committed(KEY), "nothing was committed yet"
    d.first_token()
    assert d.take_commit() == 3, "it may overtake the data"
    assert held(d)
    assert d.committed(KEY)
    assert held(d), "a write still reads the source"
    d.written(KEY, moves)
    assert not held(d)
    assert not d.committed(KEY)
    assert not d.fail("too late")
    assert d.take_closed() == []


def test_a_failed_write_ends_the_handoff() -> None:
    d = delivery()
    d.computed(40)
    d.granted(ticket())
    first, second = d.take_moves(2), d.take_moves(2)
    d.write_failed(KEY, first, "refused")
    d.first_token()
    assert d.take_commit() is None
    assert d.take_moves(8) == []
    assert d.state is DeliveryState.FAILED
    assert d.reason == "refused"
    assert d.take_closed() == [], "a write is still under way"
    d.written(KEY, second)
    assert d.take_closed() == [KEY]
    assert not held(d)


def test_a_rebind_starts_over_and_closes_the_old() -> None:
    d = delivery()
    d.computed(40)
    d.granted(ticket())
    moves = d.take_moves(8)
    assert d.rebind(NEXT)
    assert not d.rebind(KEY)
    assert d.take_closed() == []
    assert d.granted(ticket(NEXT, cached=2, generation=5)) is GrantAnswer.ACCEPTED
    d.written(KEY, moves)  # of the old handoff: counts for nothing now
    assert d.take_closed() == [KEY]
    assert not d.delivered
    assert indices(d.take_moves(8)) == [2]
    assert not d.committed(KEY)
    assert not d.refused(KEY, "late")


def test_a_refused_handoff_needs_no_closed() -> None:
    d = delivery()
    assert d.refused(KEY, "full")
    assert not d.refused(KEY, "full")
    assert d.state is DeliveryState.FAILED
    assert d.take_closed() == []
    assert d.rebind(NEXT)
    assert d.granted(ticket(KEY)) is GrantAnswer.STALE
    assert d.take_closed() == [KEY], "the receiver holds memory for a grant that is not used"


def test_a_duplicate_grant_changes_nothing_and_an_unfit_one_fails() -> None:
    d = delivery()
    assert d.granted(ticket()) is GrantAnswer.ACCEPTED
    assert d.granted(ticket()) is GrantAnswer.DUPLICATE
    assert d.take_closed() == []
    d = delivery()
    assert d.granted(ticket(blocks=2)) is GrantAnswer.INVALID
    assert d.take_closed() == [KEY]


def test_an_abort_is_answered_each_time() -> None:
    d = delivery()
    d.computed(40)
    d.granted(ticket())
    moves = d.take_moves(2)
    assert d.aborted(KEY, "expired")
    assert d.take_moves(2) == []
    assert d.take_closed() == []
    d.written(KEY, moves)
    assert d.take_closed() == [KEY]
    assert not d.aborted(KEY, "expired")
    assert d.take_closed() == [KEY]


class DeliveryMachine(RuleBasedStateMachine):
    """Everything may come twice, late, or in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.delivery = delivery()
        self.progress = 0
        self.flying: list[tuple[HandoffKey, list[BlockMove]]] = []
        self.placed: dict[HandoffKey, set[int]] = {}
        self.closed: list[HandoffKey] = []
        self.commits: list[HandoffKey] = []
        self.tickets: dict[HandoffKey, Ticket] = {}

    some_key = st.builds(HandoffKey, st.just(ATTEMPT), st.integers(1, 4))

    @rule(tokens=st.integers(0, TOKENS))
    def computed(self, tokens: int) -> None:
        self.progress = max(self.progress, tokens)
        self.delivery.computed(tokens)

    @rule()
    def compute_all(self) -> None:
        self.computed(TOKENS)
        self.delivery.first_token()

    @rule(cached=st.integers(0, 3))
    def grant(self, cached: int) -> None:
        key = self.delivery.key
        waiting = self.delivery.state is DeliveryState.AWAITING_GRANT
        answer = self.delivery.granted(self.tickets.setdefault(key, ticket(key, cached, generation=key.handoff)))
        assert (answer is GrantAnswer.ACCEPTED) == waiting

    @precondition(lambda self: self.tickets)
    @rule(data=st.data())
    def late_grant(self, data: st.DataObject) -> None:
        late = data.draw(st.sampled_from(sorted(self.tickets.values(), key=lambda t: t.key.handoff)))
        if late.key != self.delivery.key:
            state = self.delivery.state
            assert self.delivery.granted(late) is GrantAnswer.STALE
            assert self.delivery.state is state

    @rule(limit=st.integers(1, 3))
    def take(self, limit: int) -> None:
        moves = self.delivery.take_moves(limit)
        assert len(moves) <= limit
        if not moves:
            return
        key = self.delivery.key
        used = self.tickets[key]
        assert key not in self.closed, "written after its Closed"
        busy = {m.index for k, batch in self.flying if k == key for m in batch} | self.placed.get(key, set())
        for move in moves:
            assert move.index not in busy
            assert used.destination(move.index) == move.destination
            assert move.source == self.delivery.source[move.index]
            assert min((move.index + 1) * BLOCK_TOKENS, TOKENS) <= self.progress, "sent before it was complete"
        self.flying.append((key, moves))

    @precondition(lambda self: self.flying)
    @rule(data=st.data(), how=st.sampled_from(["written", "failed"]))
    def returned(self, data: st.DataObject, how: str) -> None:
        key, moves = self.flying.pop(data.draw(st.integers(0, len(self.flying) - 1)))
        if how == "written":
            self.delivery.written(key, moves)
            self.placed.setdefault(key, set()).update(move.index for move in moves)
        else:
            self.delivery.write_failed(key, moves, "broken")

    @rule()
    def commit(self) -> None:
        key = self.delivery.key
        blocks = self.delivery.take_commit()
        if blocks is not None:
            assert key not in self.commits
            assert self.progress == TOKENS
            assert blocks == len(self.tickets[key].writable)
            under_way = {m.index for k, batch in self.flying if k == key for m in batch}
            assert under_way | self.placed.get(key, set()) == set(self.tickets[key].writable)
            self.commits.append(key)

    @rule(key=some_key, what=st.sampled_from(["committed", "refused", "aborted", "rebind", "fail"]))
    def message(self, key: HandoffKey, what: str) -> None:
        d = self.delivery
        before = (d.state, d.key)
        if what == "committed":
            applied = d.committed(key)
        elif what == "refused":
            applied = d.refused(key, "full")
        elif what == "aborted" and key in self.tickets:
            applied = d.aborted(key, "expired")
        elif what == "rebind":
            applied = d.rebind(key)
        elif what == "fail":
            applied = d.fail("cancelled")
        else:
            return
        if not applied:
            assert (d.state, d.key) == before
        elif what == "committed":
            assert key in self.commits

    @rule()
    def close(self) -> None:
        for key in self.delivery.take_closed():
            assert not any(flying == key for flying, _ in self.flying), "Closed while a write is under way"
            assert key != self.delivery.key or self.delivery.state in (DeliveryState.FAILED, DeliveryState.RELEASED)
            self.closed.append(key)

    @invariant()
    def the_source_is_safe(self) -> None:
        assert self.delivery.in_flight == sum(len(batch) for _, batch in self.flying)
        if self.flying or self.delivery.state in (DeliveryState.DELIVERING, DeliveryState.COMMITTING):
            assert held(self.delivery)


TestDeliveryMachine = DeliveryMachine.TestCase
TestDeliveryMachine.settings = settings(max_examples=120, stateful_step_count=50, deadline=None)
