from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvtransfer.blocks.pool import BlockPool, CacheChange, PoolCorrupt

BLOCKS = 8
DIGESTS = [bytes([n]) * 16 for n in range(12)]


def test_allocation_is_all_or_nothing() -> None:
    pool = BlockPool(4)
    assert pool.allocate(5) is None
    first = pool.allocate(3)
    assert first is not None
    assert len(set(first)) == 3
    assert pool.allocate(2) is None
    assert pool.available == 1
    assert pool.allocate(0) == []
    pool.release(first)
    assert pool.statistics().free == 4


def test_a_digest_keeps_a_block_until_room_is_needed() -> None:
    pool, changes = BlockPool(3), []
    pool.listeners.append(lambda change, digest: changes.append((change, digest)))
    blocks = pool.allocate(2) or []
    assert pool.insert(blocks[0], DIGESTS[0])
    assert pool.insert(blocks[1], DIGESTS[1])
    pool.release(blocks)
    assert pool.statistics().cached == 2
    assert pool.match(DIGESTS[:3]) == blocks
    pool.release(blocks)
    assert len(pool.allocate(2) or []) == 2
    assert changes[-1] == (CacheChange.EVICTED, DIGESTS[1])  # the end of a chain goes before its start
    assert pool.peek(DIGESTS[:2]) == 1
    assert pool.statistics().evictions == 1


def cache(pool: BlockPool, *digests: bytes) -> None:
    """A sequence of these blocks comes and goes."""
    matched = pool.match(digests)
    blocks = matched + (pool.allocate(len(digests) - len(matched)) or [])
    for block, digest in zip(blocks, digests, strict=True):
        pool.insert(block, digest)
    pool.release(blocks)


def test_what_was_found_outlives_what_was_not() -> None:
    pool = BlockPool(6)
    for _ in range(2):
        cache(pool, *DIGESTS[:2])
    for n in range(2, 12, 2):
        cache(pool, *DIGESTS[n : n + 2])
        pool.check_integrity()
    assert pool.peek(DIGESTS[:2]) == 2
    assert [n for n in range(2, 12) if pool.peek(DIGESTS[n : n + 1])] == [8, 9, 10, 11]


def test_protection_ends_with_half_of_the_pool() -> None:
    pool = BlockPool(6)
    for n in (0, 2, 4):
        for _ in range(2):
            cache(pool, *DIGESTS[n : n + 2])
    pool.check_integrity()
    cache(pool, *DIGESTS[6:8])
    assert [n for n in range(8) if pool.peek(DIGESTS[n : n + 1])] == [2, 3, 4, 5, 6, 7], (
        "0 and 1 were found longest ago"
    )


def test_on_a_duplicate_the_first_stays() -> None:
    pool = BlockPool(3)
    first, second = pool.allocate(2) or []
    assert pool.insert(first, DIGESTS[0])
    assert not pool.insert(second, DIGESTS[0])
    assert not pool.insert(first, DIGESTS[1])
    pool.release([second])
    assert pool.statistics().cached == 0
    assert pool.match(DIGESTS[:1]) == [first]
    assert pool.holds(first) == 2


def test_a_match_stops_at_the_first_gap() -> None:
    pool = BlockPool(3)
    blocks = pool.allocate(3) or []
    for block, digest in zip(blocks, (DIGESTS[0], DIGESTS[2], DIGESTS[3]), strict=True):
        pool.insert(block, digest)
    assert pool.match(DIGESTS[:4]) == blocks[:1]


def test_quarantine_takes_blocks_and_spares_what_others_hold() -> None:
    pool = BlockPool(4)
    blocks = pool.allocate(3) or []
    pool.insert(blocks[0], DIGESTS[0])
    pool.insert(blocks[1], DIGESTS[1])
    pool.match(DIGESTS[:1])
    assert pool.quarantine(blocks) == blocks[1:]
    assert pool.available == 1
    assert pool.peek(DIGESTS[1:2]) == 0, "what may still be written is not found"
    pool.unquarantine(blocks[1:])
    assert pool.available == 3


def test_misuse_is_caught() -> None:
    pool = BlockPool(2)
    with pytest.raises(AssertionError):
        pool.release([0])
    with pytest.raises(AssertionError):
        pool.hold([0])
    with pytest.raises(AssertionError):
        pool.insert(0, DIGESTS[0])
    with pytest.raises(AssertionError):
        pool.unquarantine([0])
    with pytest.raises(ValueError, match="blocks"):
        BlockPool(0)


class Careless(BlockPool):
    def lose_holds(self, block: int) -> None:
        self._holds[block] = 0


def test_corruption_is_named() -> None:
    pool = Careless(2)
    pool.allocate(1)
    pool.lose_holds(0)
    with pytest.raises(PoolCorrupt):
        pool.check_integrity()


class PoolMachine(RuleBasedStateMachine):
    """Holders come and go; a model counts what each block must be."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(BLOCKS)
        self.known: set[bytes] = set()
        self.pool.listeners.append(self.listen)
        self.holders: list[list[int]] = []
        self.quarantined: list[int] = []

    def listen(self, change: CacheChange, digest: bytes) -> None:
        assert (digest in self.known) == (change is CacheChange.EVICTED)
        self.known ^= {digest}

    @rule(count=st.integers(0, BLOCKS))
    def allocate(self, count: int) -> None:
        available = self.pool.available
        blocks = self.pool.allocate(count)
        assert (blocks is None) == (count > available)
        if blocks:
            assert not set(blocks) & {b for holder in self.holders for b in holder}
            assert not set(blocks) & set(self.quarantined)
            self.holders.append(blocks)

    @rule(digests=st.lists(st.sampled_from(DIGESTS), max_size=4))
    def match(self, digests: list[bytes]) -> None:
        count = self.pool.peek(digests)
        cost, available = self.pool.cost(digests, count), self.pool.available
        blocks = self.pool.match(digests)
        assert len(blocks) == count
        if len(set(blocks)) == count:  # a sequence has a block once
            assert self.pool.available == available - cost
        if blocks:
            self.holders.append(blocks)

    @precondition(lambda self: self.holders)
    @rule(data=st.data(), digest=st.sampled_from(DIGESTS))
    def insert(self, data: st.DataObject, digest: bytes) -> None:
        block = data.draw(st.sampled_from(data.draw(st.sampled_from(self.holders))))
        known = digest in self.known
        assert not (self.pool.insert(block, digest) and known)

    @precondition(lambda self: self.holders)
    @rule(data=st.data(), end=st.sampled_from(["release", "quarantine", "hold", "forget"]))
    def end(self, data: st.DataObject, end: str) -> None:
        holder = data.draw(st.integers(0, len(self.holders) - 1))
        if end == "hold":
            self.pool.hold(self.holders[holder])
            self.holders.append(list(self.holders[holder]))
        elif end == "release":
            self.pool.release(self.holders.pop(holder))
        elif end == "forget":
            self.pool.forget(self.holders[holder])
        else:
            self.quarantined += self.pool.quarantine(self.holders.pop(holder))

    @precondition(lambda self: self.quarantined)
    @rule()
    def prove(self) -> None:
        self.pool.unquarantine(self.quarantined)
        self.quarantined = []

    @invariant()
    def adds_up(self) -> None:
        self.pool.check_integrity()
        state = self.pool.statistics()
        held = [block for holder in self.holders for block in holder]
        assert state.free + state.held + state.cached + state.quarantined == BLOCKS
        assert state.held == len(set(held))
        assert all(self.pool.holds(block) == held.count(block) for block in range(BLOCKS))
        assert state.quarantined == len(self.quarantined)


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
