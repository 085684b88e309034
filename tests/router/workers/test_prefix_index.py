"""The index against a plain model, and what a lookup touches."""

from __future__ import annotations

from itertools import takewhile

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from router.workers.prefix_index import PrefixIndex

WORKERS = tuple("abcd")
DIGESTS = [bytes([n]) * 16 for n in range(10)]


def test_every_worker_has_its_own_run() -> None:
    index: PrefixIndex[str] = PrefixIndex(100)
    index.insert("a", DIGESTS[:4])
    index.insert("b", DIGESTS[:2])
    index.insert("c", [*DIGESTS[:1], *DIGESTS[2:4]])
    index.insert("d", DIGESTS[1:4])
    assert index.runs(DIGESTS) == {"a": 4, "b": 2, "c": 1}
    assert index.runs(DIGESTS[1:]) == {"d": 3, "a": 3, "b": 1}
    assert index.runs([]) == index.runs(DIGESTS[7:]) == {}


def test_a_lookup_takes_no_more_digests_than_it_needs() -> None:
    index: PrefixIndex[str] = PrefixIndex(100)
    index.insert("a", DIGESTS[:3])
    rest = iter(DIGESTS)
    assert index.runs(rest) == {"a": 3}
    assert next(rest) == DIGESTS[4]


def test_the_least_recently_used_go_and_chains_keep_their_start() -> None:
    index: PrefixIndex[str] = PrefixIndex(6)
    assert index.insert("a", DIGESTS[:3]) == 0
    assert index.insert("a", DIGESTS[3:6]) == 0
    assert index.runs(DIGESTS[:3]) == {"a": 3}
    assert index.insert("b", DIGESTS[6:8]) == 2
    assert index.runs(DIGESTS[3:6]) == {"a": 1}, "the end of the chain that no caller asked for"
    assert index.runs(DIGESTS[:3]) == {"a": 3}
    assert index.insert("b", DIGESTS[:3]) == 3
    assert (index.held_by("a"), index.held_by("b")) == (frozenset(DIGESTS[:3]), frozenset(DIGESTS[:3]))


def test_one_worker_may_fill_it_alone() -> None:
    index: PrefixIndex[str] = PrefixIndex(4)
    assert index.insert("a", DIGESTS) == 6
    assert index.runs(DIGESTS) == {"a": 4}


@pytest.mark.parametrize("workers", [1, 64, 200])
def test_any_number_of_workers(workers: int) -> None:
    index: PrefixIndex[int] = PrefixIndex(10_000)
    for worker in range(workers):
        index.insert(worker, DIGESTS[: 1 + worker % 10])
    assert index.runs(DIGESTS) == {worker: 1 + worker % 10 for worker in range(workers)}
    for worker in range(0, workers, 2):
        index.forget(worker)
    index.insert(-1, DIGESTS[:5])
    assert index.runs(DIGESTS) == {worker: 1 + worker % 10 for worker in range(1, workers, 2)} | {-1: 5}


class IndexMachine(RuleBasedStateMachine):
    """Against sets, and a list in the order of use."""

    LIMIT = 12

    def __init__(self) -> None:
        super().__init__()
        self.index: PrefixIndex[str] = PrefixIndex(self.LIMIT)
        self.held: dict[str, set[bytes]] = {worker: set() for worker in WORKERS}
        self.order: list[bytes] = []

    def use(self, digest: bytes) -> None:
        self.order = [other for other in self.order if other != digest] + [digest]

    @rule(worker=st.sampled_from(WORKERS), digests=st.lists(st.sampled_from(DIGESTS), unique=True))
    def insert(self, worker: str, digests: list[bytes]) -> None:
        for digest in reversed(digests):
            if digest not in self.held[worker]:
                self.held[worker].add(digest)
                self.use(digest)
        dropped = 0
        while sum(map(len, self.held.values())) > self.LIMIT:
            oldest = self.order.pop(0)
            for held in self.held.values():
                dropped += oldest in held
                held.discard(oldest)
        assert self.index.insert(worker, digests) == dropped

    @rule(worker=st.sampled_from(WORKERS), digests=st.lists(st.sampled_from(DIGESTS), unique=True))
    def evict(self, worker: str, digests: list[bytes]) -> None:
        self.index.evict(worker, digests)
        self.held[worker] -= set(digests)

    @rule(worker=st.sampled_from(WORKERS))
    def forget(self, worker: str) -> None:
        self.index.forget(worker)
        self.held[worker].clear()

    @rule(digests=st.lists(st.sampled_from(DIGESTS), unique=True))
    def look_up(self, digests: list[bytes]) -> None:
        runs = {w: sum(1 for _ in takewhile(held.__contains__, digests)) for w, held in self.held.items()}
        assert self.index.runs(digests) == {worker: run for worker, run in runs.items() if run}
        for digest in reversed(digests[: max(runs.values())]):
            self.use(digest)

    @invariant()
    def what_is_known_is_the_same(self) -> None:
        assert {worker: set(self.index.held_by(worker)) for worker in WORKERS} == self.held
        assert len(self.index) == sum(map(len, self.held.values())) <= self.LIMIT
        self.order = [digest for digest in self.order if any(digest in held for held in self.held.values())]
        assert list(self.index._holders) == self.order, "no entry is left without a holder"


TestIndex = IndexMachine.TestCase
TestIndex.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
