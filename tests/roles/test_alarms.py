"""Cancels, deadlines and handoffs bound anew, at random moments: no counter that means a fault moves."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace

import pytest

from kvtransfer.handoffs.messages import Aborted
from kvtransfer.transports.memory import MemoryChannel
from tests.alarms import raised
from tests.roles.conftest import Cluster
from tests.roles.counting import LAYOUT
from tests.roles.test_cancel import StalledWrite
from tests.rpc.waiting import until

BLOCK = LAYOUT.block_tokens
REQUESTS = 80
AT_ONCE = 12


async def one_request(cluster: Cluster, seed: int) -> None:
    """What a router does, cut off at some moment."""
    dice, router = random.Random(seed), cluster.router
    spec = router.spec(
        dice.randint(1, 12 * BLOCK),
        max_tokens=dice.randint(1, 30),
        deadline_s=dice.choice([None, None, dice.uniform(0.001, 0.03)]),
    )
    direct = dice.random() < 0.2
    nodes = [cluster.p, cluster.d]
    if direct:
        router.direct(cluster.d, spec)
    else:
        router.prefill(cluster.p, spec)
        await until(lambda: router.heard(cluster.p, "started", spec) or router.heard(cluster.p, "ended", spec), "start")
        handoffs = dice.choice([1, 1, 2, 3])
        for handoff in range(1, handoffs + 1):
            router.bind(cluster.p, spec, cluster.d, handoff)
            await asyncio.sleep(dice.choice([0.0, 0.001, 0.004]))
    await asyncio.sleep(dice.choice([0.0, 0.001, 0.003, 0.01, 0.05]) * dice.random())
    dice.shuffle(nodes)
    for node in nodes:
        router.cancel(node, spec)
        await asyncio.sleep(dice.choice([0.0, 0.0, 0.002]))
    for node in nodes:
        await router.hears(node, "freed", spec)


@pytest.mark.parametrize("kind", ["memory", "shm", "tcp"])
async def test_no_ordinary_end_raises_an_alarm(cluster: Cluster, kind: str) -> None:
    await cluster.add_prefill(kind=kind, blocks=128, max_ungranted=16)
    await cluster.add_decode(kind=kind, blocks=48)
    room = asyncio.Semaphore(AT_ONCE)

    async def within(seed: int) -> None:
        async with room:
            await one_request(cluster, seed)

    async with asyncio.TaskGroup() as group:
        for seed in range(REQUESTS):
            group.create_task(within(seed))
    await cluster.idle()
    for node in cluster.nodes.values():
        assert raised(node.counts.snapshot()) == {}, node.name


@pytest.mark.parametrize("kind", ["memory", "shm", "tcp"])
async def test_a_refusal_may_overtake_the_news_of_the_cancel(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """The prefill worker, which has not been told yet, sees only that its write is refused."""
    await cluster.add_prefill(kind=kind)
    await cluster.add_decode(kind=kind)
    await cluster.serve(cluster.router.spec(3))  # the pair is up
    aborted = cluster.d.streams.aborted
    held: list[Aborted] = []
    monkeypatch.setattr(cluster.d.streams, "aborted", held.append)
    spec = cluster.router.spec(4 * BLOCK)
    with StalledWrite(cluster) as stalled:
        await cluster.bound(spec)
        await until(stalled.entered.is_set, "the write")
        cluster.router.cancel(cluster.d, spec)
        await until(lambda: held, "the cancel")
    await cluster.router.hears(cluster.p, "handoff_failed", spec)
    await until(lambda: cluster.d.count("writes_revoked"), "its side of the refusal")
    assert cluster.p.count("writes_revoked") == 1
    aborted(held[0])
    cluster.router.cancel(cluster.p, spec)
    await cluster.router.hears(cluster.p, "freed", spec)
    await cluster.idle()
    for node in cluster.nodes.values():
        assert raised(node.counts.snapshot()) == {}, node.name


async def test_a_write_under_a_wrong_ticket_is_an_alarm_on_both_sides(
    pair: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = MemoryChannel.write
    monkeypatch.setattr(
        MemoryChannel, "write", lambda self, ticket, *rest: write(self, replace(ticket, generation=99), *rest)
    )
    spec = pair.router.spec(4 * BLOCK)
    await pair.bound(spec)
    await pair.router.hears(pair.p, "handoff_failed", spec)
    await until(lambda: pair.d.count("writes_refused"), "the alarm")
    assert raised(pair.p.counts.snapshot()) == {"writes_failed": 1}
    assert raised(pair.d.counts.snapshot()) == {"writes_refused": 1}
    for node in (pair.p, pair.d):
        pair.router.cancel(node, spec)
