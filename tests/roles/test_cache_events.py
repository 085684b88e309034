"""What a router knows of real workers' pools, over the real stream, is what they hold."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest

from baton.identity import mint_process
from baton.messages import CacheUpdate, Event
from baton.model import ModelCard
from baton.spec import SequenceSpec
from baton.telemetry import Counts
from baton.v1 import worker_pb2 as wire
from baton.worker import cache_events
from router.workers.link import WorkerLink
from router.workers.prefixes import Prefixes, digests_of
from router.workers.worker import Registration, Worker
from tests.roles.conftest import Cluster
from tests.roles.counting import LAYOUT
from tests.roles.node import Node, Settings
from tests.rpc.waiting import until

BLOCK = LAYOUT.block_tokens
CARD = ModelCard("m", Settings().fingerprint, 4096, 1000, (), "", "", LAYOUT)


class Observer:
    """A second router: its links and its index are real, and it places nothing."""

    def __init__(self) -> None:
        self.process = mint_process("router", "", "observer")
        self.counts = Counts()
        self.prefixes = Prefixes(10_000, self.counts)
        self.workers: dict[str, Worker] = {}
        self.updates: list[CacheUpdate] = []
        self.loses: Callable[[CacheUpdate], bool] = lambda _: False

    def watch(self, node: Node) -> Worker:
        """Asks for what it holds."""
        link = WorkerLink(
            node.process,
            self.process,
            on_event=lambda event: self.on_event(worker, event),
            on_state=lambda: None,
            on_lost=lambda _: self.prefixes.on_lost(worker),
        )
        given = Registration(node.process, frozenset({"prefill"}), CARD, node.pool.blocks, 8, ())
        worker = self.workers[node.name] = Worker(given, link, 0.0)
        self.prefixes.on_joined(worker)
        link.start()
        return worker

    def on_event(self, worker: Worker, event: Event | None) -> None:
        """What the router's table of handlers does."""
        if isinstance(event, CacheUpdate) and not self.loses(event):
            self.updates.append(event)
            self.prefixes.on_update(worker, event)

    def cached(self, spec: SequenceSpec) -> dict[str, int]:
        """Tokens by name of worker."""
        return {
            worker.name: tokens
            for worker, tokens in self.prefixes.cached_tokens(
                CARD, len(spec.prompt), digests_of(CARD, spec.prompt, spec.tenant_salt)
            ).items()
        }

    async def knows(self, *nodes: Node) -> None:
        """Waits until it knows exactly what these pools hold."""
        for node in nodes:
            worker = self.workers[node.name]
            await until(
                lambda node=node, worker=worker: (  # type: ignore[misc]
                    self.prefixes.held_by(worker) == set(node.pool.digests())
                ),
                f"knows {node.name}",
            )

    async def close(self) -> None:
        """Ends its streams."""
        for worker in self.workers.values():
            await worker.link.close()


@pytest.fixture
async def observer(cluster: Cluster) -> AsyncIterator[Observer]:
    observer = Observer()
    yield observer
    await observer.close()


def told(cluster: Cluster) -> list[wire.CacheEvents]:
    """What the scripted router was told by p0."""
    frames = cluster.router.links["p0"].frames
    return [frame.cache_events for frame in frames if frame.WhichOneof("body") == "cache_events"]


def continued(cluster: Cluster, spec: SequenceSpec, *more: int) -> SequenceSpec:
    """Another request whose prompt starts with that of `spec`."""
    return cluster.router.spec([*spec.prompt, *more], max_tokens=4, tenant_salt=spec.tenant_salt)


async def test_a_router_knows_what_both_roles_hold(pair: Cluster, observer: Observer) -> None:
    early = pair.router.spec(3 * BLOCK + 5)
    await pair.serve(early)
    observer.watch(pair.p), observer.watch(pair.d)
    await observer.knows(pair.p, pair.d)
    late = pair.router.spec(2 * BLOCK + 5, max_tokens=2 * BLOCK)
    await pair.serve(late)
    await observer.knows(pair.p, pair.d)
    again = continued(pair, early, 1, 2, 3)
    assert observer.cached(again) == {"p0": 3 * BLOCK, "d0": 3 * BLOCK}
    assert observer.cached(continued(pair, late, *pair.router.output(late))) == {"p0": 2 * BLOCK, "d0": 4 * BLOCK}
    pair.router.prefill(pair.p, again)
    started = await pair.router.hears(pair.p, "started", again)
    assert started.cached_tokens == observer.cached(again)["p0"], "what was foretold"
    pair.router.bind(pair.p, again, pair.d)
    await pair.finished(again)


async def test_evictions_are_told(pair: Cluster, observer: Observer) -> None:
    node = await pair.add_prefill("small", blocks=8)
    observer.watch(node)
    specs = [pair.router.spec(3 * BLOCK, max_tokens=1) for _ in range(6)]
    for spec in specs:
        pair.router.prefill(node, spec)
        await pair.router.hears(node, "ended", spec)
    await observer.knows(node)
    assert node.pool.statistics().evictions > 0
    assert observer.cached(specs[0]) == {}
    assert observer.cached(specs[-1]) == {"small": 2 * BLOCK}
    assert any(update.evicted for update in observer.updates)


async def test_tenants_share_nothing(cluster: Cluster, observer: Observer) -> None:
    node = await cluster.add_prefill()
    observer.watch(node)
    spec = cluster.router.spec(3 * BLOCK + 1, max_tokens=1, tenant_salt="one")
    cluster.router.prefill(node, spec)
    await cluster.router.hears(node, "ended", spec)
    await observer.knows(node)
    assert observer.cached(spec) == {"p0": 3 * BLOCK}
    other = cluster.router.spec(list(spec.prompt), max_tokens=1, tenant_salt="two")
    assert observer.cached(other) == {}
    cluster.router.prefill(node, other)
    assert (await cluster.router.hears(node, "started", other)).cached_tokens == 0
    await cluster.router.hears(node, "ended", other)
    await observer.knows(node)
    assert len(node.pool.digests()) == 6


async def test_a_missing_event_is_found_and_made_good(cluster: Cluster, observer: Observer) -> None:
    node = await cluster.add_prefill()
    observer.watch(node)
    await until(lambda: observer.updates, "the snapshot")
    missed: list[CacheUpdate] = []

    def loses_one(update: CacheUpdate) -> bool:
        missed.append(update)
        return len(missed) == 1

    observer.loses = loses_one
    specs = [cluster.router.spec(3 * BLOCK, max_tokens=1) for _ in range(2)]
    cluster.router.prefill(node, specs[0])
    await until(lambda: missed, "an event that gets lost")
    assert not observer.cached(specs[0])
    cluster.router.prefill(node, specs[1])
    await until(lambda: len(observer.prefixes) == 6, "all of it")
    await observer.knows(node)
    assert observer.counts.snapshot()["cache_gaps"] == 1
    assert node.count("cache_snapshots") == 2


async def test_a_broken_stream_loses_nothing(cluster: Cluster, observer: Observer) -> None:
    node = await cluster.add_prefill()
    worker = observer.watch(node)
    await until(lambda: observer.updates, "the snapshot")
    session = node.worker.session(observer.process)
    assert session is not None
    session.link.detach()
    await until(lambda: worker.link.breaks == 1, "the break")
    for _ in range(3):
        spec = cluster.router.spec(3 * BLOCK, max_tokens=1)
        cluster.router.prefill(node, spec)
        await cluster.router.hears(node, "ended", spec)
    await observer.knows(node)
    assert "cache_gaps" not in observer.counts.snapshot()
    assert node.count("cache_snapshots") == 1


async def test_a_dead_worker_is_forgotten(cluster: Cluster, observer: Observer) -> None:
    node = await cluster.add_prefill()
    observer.watch(node)
    spec = cluster.router.spec(3 * BLOCK, max_tokens=1)
    cluster.router.prefill(node, spec)
    await cluster.router.hears(node, "ended", spec)
    await until(lambda: len(observer.prefixes) == 3, "its blocks")
    await node.die()
    await until(lambda: len(observer.prefixes) == 0, "nothing")


async def test_nothing_is_sent_to_a_router_that_has_not_asked(cluster: Cluster) -> None:
    node = await cluster.add_prefill()
    spec = cluster.router.spec(3 * BLOCK, max_tokens=1)
    cluster.router.prefill(node, spec)
    await cluster.router.hears(node, "ended", spec)
    await asyncio.sleep(2 * cache_events.INTERVAL_S)
    assert told(cluster) == []


async def test_a_large_snapshot_delays_no_answer(cluster: Cluster) -> None:
    node = await cluster.add_prefill(blocks=40_000)
    blocks = node.pool.allocate(40_000) or []
    for block in blocks:
        node.pool.insert(block, block.to_bytes(16, "big"))
    node.pool.release(blocks)
    cluster.router.say(node, cache_sync=wire.CacheSyncCommand(sync=1))
    spec = cluster.router.spec(20)
    cluster.router.cancel(node, spec)
    await cluster.router.hears(node, "freed", spec)
    assert len(told(cluster)) <= 2, "the answer came between the pieces"
    await until(lambda: sum(len(body.inserted) for body in told(cluster)) == 40_000, "all of it")


async def test_a_router_that_does_not_read_is_told_later(
    cluster: Cluster, observer: Observer, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = await cluster.add_prefill()
    worker = observer.watch(node)
    await until(lambda: observer.updates, "the snapshot")
    monkeypatch.setattr(cache_events, "BACKLOG_FRAMES", 0)
    spec = cluster.router.spec(3 * BLOCK, max_tokens=1)
    cluster.router.prefill(node, spec)
    await cluster.router.hears(node, "ended", spec)
    await asyncio.sleep(2 * cache_events.INTERVAL_S)
    assert observer.prefixes.held_by(worker) == frozenset()
    monkeypatch.undo()
    await observer.knows(node)
    assert len(observer.prefixes) == 3
