"""From a pool through its feed to the router's index: what is lost or late on the way costs knowledge, not truth."""

from __future__ import annotations

import os
from collections import deque
from functools import partial

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from baton.messages import CacheUpdate
from baton.model import KvLayout, ModelCard
from baton.rpc.frames import event_to_frame
from baton.spec import ProcessRef
from baton.telemetry import Counts
from baton.worker.cache_events import CacheFeed
from kvtransfer.blocks.pool import BlockPool, CacheChange
from kvtransfer.blocks.prefix import block_digests
from router.workers.link import WorkerLink
from router.workers.prefixes import Prefixes, digests_of
from router.workers.worker import Registration, Worker

ROUTER = ProcessRef("router", "r-1", "")
CARD = ModelCard("m", "f" * 32, 4096, 1000, (), "", "", KvLayout(2, 1, 4, "float32"))
DIGESTS = [bytes([n]) * 16 for n in range(12)]


def make_worker(name: str) -> Worker:
    """One whose stream is never started: what is sent to it waits in `sent`."""
    process = ProcessRef(name, os.urandom(4).hex(), "")
    link = WorkerLink(process, ROUTER, on_event=lambda _: None, on_state=lambda: None, on_lost=lambda _: None)
    return Worker(Registration(process, frozenset({"prefill"}), CARD, 64, 8, ()), link, 0.0)


def sent(worker: Worker) -> list[int]:
    """The syncs that it was asked for since the last call."""
    frames = iter(worker.link._session._lanes.take, None)
    return [frame.cache_sync.sync for frame in frames if frame.WhichOneof("body") == "cache_sync"]


def events(sync: int, sequence: int, *inserted: bytes, evicted: tuple[bytes, ...] = ()) -> CacheUpdate:
    return CacheUpdate(sync, sequence, inserted, evicted)


def cached(prefixes: Prefixes, tokens: tuple[int, ...], salt: str = "") -> dict[Worker, int]:
    return prefixes.cached_tokens(CARD, len(tokens), digests_of(CARD, tokens, salt))


def test_a_gap_costs_the_knowledge_and_asks_again() -> None:
    counts, worker, other = Counts(), make_worker("w"), make_worker("x")
    prefixes = Prefixes(100, counts)
    for joined in (worker, other):
        prefixes.on_joined(joined)
        assert sent(joined) == [1]
        prefixes.on_update(joined, events(1, 1, *DIGESTS[:3]))
    prefixes.on_update(worker, events(1, 3, DIGESTS[4]))
    assert sent(worker) == [2]
    assert (prefixes.held_by(worker), len(prefixes)) == (frozenset(), 3), "the other's is untouched"
    prefixes.on_update(worker, events(1, 4, DIGESTS[5]))
    assert prefixes.held_by(worker) == frozenset(), "sent before it heard of the sync"
    prefixes.on_update(worker, events(2, 2, DIGESTS[5]))
    assert sent(worker) == [3], "the first one was missing"
    prefixes.on_update(worker, events(3, 1, DIGESTS[6]))
    assert prefixes.held_by(worker) == {DIGESTS[6]}
    assert (counts.snapshot()["cache_gaps"], counts.snapshot()["cache_syncs"]) == (2, 4)


def test_a_lost_worker_is_forgotten_and_late_events_change_nothing() -> None:
    worker, prefixes = make_worker("w"), Prefixes(100, Counts())
    prefixes.on_joined(worker)
    prefixes.on_update(worker, events(1, 1, *DIGESTS))
    prefixes.on_lost(worker)
    prefixes.on_lost(worker)
    prefixes.on_update(worker, events(1, 2, *DIGESTS))
    assert len(prefixes) == 0
    assert prefixes.held_by(worker) == frozenset()


def test_a_digest_of_another_length_ends_the_feed() -> None:
    worker, counts = make_worker("w"), Counts()
    prefixes = Prefixes(100, counts)
    prefixes.on_joined(worker)
    prefixes.on_update(worker, events(1, 1, DIGESTS[0], bytes(17)))
    prefixes.on_update(worker, events(1, 2, DIGESTS[1]))
    assert (len(prefixes), counts.snapshot()["cache_events_refused"]) == (0, 1)


def test_without_room_nothing_is_asked_for() -> None:
    worker, prefixes = make_worker("w"), Prefixes(0, Counts())
    prefixes.on_joined(worker)
    prefixes.on_update(worker, events(1, 1, *DIGESTS))
    assert sent(worker) == []
    assert (len(prefixes), cached(prefixes, (1,) * 40)) == (0, {})
    prefixes.on_lost(worker)


def test_memory_is_bounded_and_what_goes_is_counted() -> None:
    counts, workers = Counts(), [make_worker(f"w{n}") for n in range(4)]
    prefixes = Prefixes(1000, counts)
    for worker in workers:
        prefixes.on_joined(worker)
        for sequence in range(1, 11):
            prefixes.on_update(worker, events(1, sequence, *(os.urandom(16) for _ in range(100))))
    assert len(prefixes) == 1000
    assert counts.snapshot()["prefix_blocks_dropped"] == 3000


def test_tokens_that_need_no_computing() -> None:
    near, far, prefixes = make_worker("near"), make_worker("far"), Prefixes(100, Counts())
    prompt = tuple(range(64))
    for worker, blocks in ((near, 4), (far, 2)):
        prefixes.on_joined(worker)
        prefixes.on_update(worker, events(1, 1, *block_digests(prompt, 16, "tenant", CARD.fingerprint)[:blocks]))
    assert cached(prefixes, (*prompt, 1), "tenant") == {near: 64, far: 32}
    kept = digests_of(CARD, (*prompt, 1), "tenant")
    for _ in range(2):
        assert prefixes.cached_tokens(CARD, 65, kept) == {near: 64, far: 32}
    assert cached(prefixes, prompt, "tenant") == {near: 48, far: 32}, "the last one is computed"
    assert cached(prefixes, prompt[:50], "tenant") == {near: 48, far: 32}
    assert cached(prefixes, (*prompt, 1), "another") == {}
    assert cached(prefixes, (7, *prompt), "tenant") == {}
    assert cached(prefixes, (1,), "tenant") == {}


def test_what_comes_and_goes_between_two_messages_is_not_told() -> None:
    feed = CacheFeed(7, DIGESTS[:2])
    first = feed.take()
    assert (first.sync, first.sequence, list(first.inserted), list(first.evicted)) == (7, 1, DIGESTS[:2], [])
    assert not feed.due
    for change in (CacheChange.INSERTED, CacheChange.EVICTED):
        feed.changed(change, DIGESTS[5])
    for change in (CacheChange.EVICTED, CacheChange.INSERTED):
        feed.changed(change, DIGESTS[0])
    assert not feed.due
    feed.changed(CacheChange.EVICTED, DIGESTS[1])
    assert list(feed.take().evicted) == DIGESTS[1:2]


def test_a_large_pool_is_told_in_small_pieces() -> None:
    feed, known = CacheFeed(1, [n.to_bytes(16, "big") for n in range(5000)]), set[bytes]()
    feed.changed(CacheChange.EVICTED, (4999).to_bytes(16, "big"))
    while feed.due:
        piece = feed.take()
        assert event_to_frame(piece).ByteSize() < 32 * 1024
        known |= set(piece.inserted)
    assert known == {n.to_bytes(16, "big") for n in range(4999)}


def test_an_empty_pool_is_told_too() -> None:
    feed = CacheFeed(1, [])
    assert feed.due
    assert feed.take().sequence == 1
    assert not feed.due


class FeedMachine(RuleBasedStateMachine):
    """Three workers' real pools, feeds and frames under way, some of which get lost, against the pools' content."""

    def __init__(self) -> None:
        super().__init__()
        self.prefixes = Prefixes(10_000, Counts())
        self.pools = [BlockPool(6) for _ in range(3)]
        self.workers = [make_worker(f"w{n}") for n in range(3)]
        self.feeds: list[CacheFeed | None] = [None] * 3
        self.way: list[deque[CacheUpdate]] = [deque() for _ in range(3)]
        for n, pool in enumerate(self.pools):
            pool.listeners.append(partial(self.changed, n))
            self.prefixes.on_joined(self.workers[n])

    def changed(self, n: int, change: CacheChange, digest: bytes) -> None:
        feed = self.feeds[n]
        if feed is not None:
            feed.changed(change, digest)

    @rule(n=st.integers(0, 2), digests=st.lists(st.sampled_from(DIGESTS), min_size=1, max_size=4, unique=True))
    def compute(self, n: int, digests: list[bytes]) -> None:
        blocks = self.pools[n].allocate(len(digests)) or []
        for block, digest in zip(blocks, digests, strict=False):
            self.pools[n].insert(block, digest)
        self.pools[n].release(blocks)

    @rule(n=st.integers(0, 2))
    def commands_arrive(self, n: int) -> None:
        for sync in sent(self.workers[n]):
            self.feeds[n] = CacheFeed(sync, self.pools[n].digests())

    @rule(n=st.integers(0, 2))
    def tell(self, n: int) -> None:
        feed = self.feeds[n]
        if feed is not None and feed.due:
            self.way[n].append(feed.take())

    @rule(n=st.integers(0, 2), lost=st.booleans())
    def frame_arrives(self, n: int, lost: bool) -> None:
        if self.way[n]:
            frame = self.way[n].popleft()
            if not lost:
                self.prefixes.on_update(self.workers[n], frame)

    @rule(n=st.integers(0, 2))
    def restart(self, n: int) -> None:
        """The process ends, and another takes its name; its pool is empty."""
        self.prefixes.on_lost(self.workers[n])
        self.prefixes.on_update(self.workers[n], events(1, 1, DIGESTS[0]))
        self.workers[n], self.feeds[n] = make_worker(f"w{n}"), None
        self.way[n].clear()
        self.pools[n].allocate(6)
        self.pools[n] = BlockPool(6)
        self.pools[n].listeners.append(partial(self.changed, n))
        self.prefixes.on_joined(self.workers[n])

    @rule()
    def all_arrives(self) -> None:
        """Whatever was lost before: once nothing is under way any more, the router knows what the pools hold."""
        for n, pool in enumerate(self.pools):
            self.settle(n)
            if (feed := self.feeds[n]) is not None:  # a loss shows with the next event: let there be one
                digest = bytes([100 + n]) * 16
                feed.changed(CacheChange.INSERTED, digest)
                self.settle(n)
                feed = self.feeds[n]
                if feed is not None and digest in self.prefixes.held_by(self.workers[n]):
                    feed.changed(CacheChange.EVICTED, digest)
                self.settle(n)
            assert self.prefixes.held_by(self.workers[n]) == set(pool.digests())

    def settle(self, n: int) -> None:
        for _ in range(3):
            self.commands_arrive(n)
            while (feed := self.feeds[n]) is not None and feed.due:
                self.tell(n)
            while self.way[n]:
                self.frame_arrives(n, lost=False)

    @invariant()
    def nothing_is_made_up(self) -> None:
        ever = set(DIGESTS)
        for n, pool in enumerate(self.pools):
            assert self.prefixes.held_by(self.workers[n]) <= ever
            assert len(pool.digests()) <= 6


TestFeed = FeedMachine.TestCase
TestFeed.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)
