"""Residents take blocks as they write; when there are none, the newest one makes room and goes on later."""

from __future__ import annotations

import asyncio
import math
import time
from typing import Any

import pytest

from baton.spec import SequenceSpec
from tests.roles.conftest import Cluster
from tests.roles.counting import LAYOUT
from tests.rpc.waiting import until

BLOCK = LAYOUT.block_tokens
LIKELY = 10
"""Tokens that outputs are said to have; they become longer."""


def chat(cluster: Cluster, age_s: float, output: int = 100, **fields: Any) -> SequenceSpec:
    """A prompt of a block, and an output that nobody expected to become so long."""
    return cluster.router.spec(BLOCK, max_tokens=output, likely_tokens=LIKELY, age_s=age_s, **fields)


async def ends(cluster: Cluster, spec: SequenceSpec) -> None:
    ended = await cluster.router.hears(cluster.d, "ended", spec)
    assert not ended.HasField("status"), ended.message
    assert cluster.router.output(spec) == cluster.router.expected(spec)


async def to_the_end(cluster: Cluster, spec: SequenceSpec) -> int:
    """As a router that goes on in place with what came, whenever the sequence had to make room; how often that was."""
    while True:
        await until(lambda spec=spec: over(cluster, spec), "its end")  # type: ignore[misc]
        if not preempted(cluster, spec):
            await ends(cluster, spec)
            return spec.preemptions
        fields = {name: getattr(spec, name) for name in ("priority", "likely_tokens", "age_s")}
        spec = cluster.router.spec(
            list(spec.prompt),
            spec.max_tokens,
            output=(*spec.output, *cluster.router.output(spec)),
            preemptions=spec.preemptions + 1,
            **fields,
        )
        cluster.router.direct(cluster.d, spec)


def over(cluster: Cluster, spec: SequenceSpec) -> bool:
    return bool(cluster.router.heard(cluster.d, "ended", spec) or preempted(cluster, spec))


def preempted(cluster: Cluster, spec: SequenceSpec) -> list[Any]:
    return cluster.router.heard(cluster.d, "preempted", spec)


def begun(cluster: Cluster, spec: SequenceSpec) -> float:
    """Which frame of the decode worker says so; infinite before."""
    for index, frame in enumerate(cluster.router.links["d0"].frames):
        kind = frame.WhichOneof("body")
        if kind in ("started", "resident") and getattr(frame, kind).attempt == spec.attempt:
            return index
    return math.inf


async def all_to_the_end(cluster: Cluster, *specs: SequenceSpec) -> list[int]:
    for spec in specs:
        cluster.router.direct(cluster.d, spec)
    return await asyncio.gather(*(to_the_end(cluster, spec) for spec in specs))


@pytest.mark.parametrize("in_place", [False, True])
async def test_a_resident_takes_blocks_as_it_writes(cluster: Cluster, in_place: bool) -> None:
    await cluster.add_prefill()
    await cluster.add_decode()
    spec, held = chat(cluster, 0.0), set[int]()
    cluster.d.engine.before_step = lambda _: held.add(cluster.d.pool.statistics().held)
    if in_place:
        cluster.router.direct(cluster.d, spec)
        await ends(cluster, spec)
    else:
        await cluster.serve(spec)
    assert min(held) == 3, "the prompt and 31 tokens"
    assert max(held) == LAYOUT.blocks_for(spec.kv_tokens)
    assert len(held) == max(held) - min(held) + 1, "one by one"


async def test_without_a_likely_length_there_is_room_for_all_at_once(cluster: Cluster) -> None:
    await cluster.add_prefill()
    await cluster.add_decode()
    cluster.d.engine.gate.clear()
    spec = cluster.router.spec(BLOCK, max_tokens=100)
    await cluster.bound(spec)
    await cluster.router.hears(cluster.d, "resident", spec)
    assert cluster.d.pool.statistics().held == LAYOUT.blocks_for(spec.kv_tokens)
    cluster.d.engine.gate.set()
    await cluster.finished(spec)


async def test_a_loop_that_is_held_while_residents_need_blocks_fails_none(cluster: Cluster) -> None:
    """They stall, which is counted, until the loop gives them some."""
    node = await cluster.add_decode()
    specs = [chat(cluster, 0.0, output=200) for _ in range(3)]
    for spec in specs:
        cluster.router.direct(node, spec)
    for spec in specs:
        await until(lambda spec=spec: len(cluster.router.output(spec)) > 1, "its tokens")  # type: ignore[misc]
    time.sleep(0.5)  # noqa: ASYNC251  holds the loop
    for spec in specs:
        await ends(cluster, spec)
    assert node.count("sequences_stalled") >= len(specs)
    assert not node.count("sequences_preempted")


async def test_when_the_pool_is_dry_the_youngest_makes_room_and_goes_on_later(cluster: Cluster) -> None:
    node = await cluster.add_decode(blocks=18)
    young, old, middle = chat(cluster, 1.0), chat(cluster, 3.0), chat(cluster, 2.0)
    often, *never = await all_to_the_end(cluster, young, old, middle)
    assert (never, often > 0) == ([0, 0], True)
    assert preempted(cluster, young)[0].cached_tokens >= BLOCK
    assert node.count("sequences_preempted") == often


async def test_in_a_pool_for_one_they_end_one_after_another(cluster: Cluster) -> None:
    node = await cluster.add_decode(blocks=8)
    specs = [chat(cluster, float(age)) for age in range(6)]
    times = await all_to_the_end(cluster, *specs)
    assert times[-1] == 0, "the oldest"
    assert node.count("sequences_preempted") == sum(times) > 0


async def test_priority_goes_before_age_but_the_oldest_never_makes_room(cluster: Cluster) -> None:
    await cluster.add_decode(blocks=18)
    oldest, important, other = chat(cluster, 3.0, priority=-5), chat(cluster, 1.0, priority=5), chat(cluster, 2.0)
    *never, often = await all_to_the_end(cluster, oldest, important, other)
    assert (never, often > 0) == ([0, 0], True)


async def test_a_sequence_of_a_router_without_likely_lengths_never_makes_room(cluster: Cluster) -> None:
    """That router could not place it again."""
    node = await cluster.add_decode(blocks=13)
    oldest, of_old, other = chat(cluster, 3.0), cluster.router.spec(BLOCK, max_tokens=60), chat(cluster, 1.0)
    node.engine.gate.clear()
    ends = asyncio.create_task(all_to_the_end(cluster, oldest, of_old, other))
    await cluster.router.hears(node, "started", other)
    node.engine.gate.set()
    *never, often = await ends
    assert (never, often > 0) == ([0, 0], True)


async def test_a_cancel_of_what_made_room_is_acknowledged(cluster: Cluster) -> None:
    await cluster.add_decode(blocks=18)
    young, old, middle = chat(cluster, 1.0), chat(cluster, 3.0), chat(cluster, 2.0)
    others = asyncio.create_task(all_to_the_end(cluster, old, middle))
    cluster.router.direct(cluster.d, young)
    await cluster.router.hears(cluster.d, "preempted", young)
    cluster.router.cancel(cluster.d, young)
    await cluster.router.hears(cluster.d, "freed", young)
    assert await others == [0, 0]


# The line.


async def test_a_large_one_is_not_overtaken_by_small_ones_for_ever(cluster: Cluster) -> None:
    """What comes free is kept for the first in the line, while others could use it at once."""
    await cluster.add_prefill(blocks=128, max_ungranted=64)
    node = await cluster.add_decode(blocks=32)
    node.engine.gate.clear()
    running = [chat(cluster, 20.0 + number, output=60) for number in range(4)]
    for spec in running:
        cluster.router.direct(node, spec)
        await cluster.router.hears(node, "started", spec)
    large = cluster.router.spec(29 * BLOCK, max_tokens=4, age_s=10.0, likely_tokens=4)
    await cluster.bound(large)
    await cluster.router.hears(cluster.p, "handoff_waiting", large)
    small = [cluster.router.spec(BLOCK, max_tokens=8, age_s=1.0, likely_tokens=4) for _ in range(6)]
    for number, spec in enumerate(small):
        if number % 2:
            await cluster.bound(spec)
            waiting = await cluster.router.hears(cluster.p, "handoff_waiting", spec)
            assert waiting.ahead >= 1
            assert waiting.expected_ms >= 0
        else:
            cluster.router.direct(node, spec)
    await until(lambda: node.busy().get("prompts_waiting") == 3, "the prompts")
    node.engine.gate.set()
    await cluster.finished(large)
    order = [spec for spec in (*running, *small, large) if begun(cluster, spec) <= begun(cluster, large)]
    assert order == [*running, large]
    for spec in (*running, *small):
        await ends(cluster, spec)


async def test_priority_goes_first_in_the_line(cluster: Cluster) -> None:
    await cluster.add_prefill(max_ungranted=8)
    node = await cluster.add_decode(max_sequences=1)
    node.engine.gate.clear()
    running = chat(cluster, 0.0, output=3)
    await cluster.bound(running)
    await cluster.router.hears(node, "resident", running)
    low, high = chat(cluster, 5.0, output=3), chat(cluster, 1.0, output=3, priority=1)
    for spec in (low, high):
        await cluster.bound(spec)
    assert (await cluster.router.hears(cluster.p, "handoff_waiting", low)).ahead == 0
    assert (await cluster.router.hears(cluster.p, "handoff_waiting", high)).ahead == 0
    node.engine.gate.set()
    for spec in (running, high, low):
        await cluster.finished(spec)
    residents = [f.resident.attempt for f in cluster.router.links["d0"].frames if f.WhichOneof("body") == "resident"]
    assert residents == [running.attempt, high.attempt, low.attempt]


@pytest.mark.parametrize("how", ["cancel", "bound elsewhere", "deadline", "writer gone"])
async def test_what_waits_leaves_the_line(cluster: Cluster, how: str) -> None:
    await cluster.add_prefill()
    await cluster.add_decode(max_sequences=1)
    other = await cluster.add_decode("d1")
    cluster.d.engine.gate.clear()
    running = chat(cluster, 0.0, output=3)
    cluster.router.direct(cluster.d, running)
    await cluster.router.hears(cluster.d, "started", running)
    waits = chat(cluster, 0.0, output=3, deadline_s=1.0 if how == "deadline" else 60.0)
    await cluster.bound(waits)
    await cluster.router.hears(cluster.p, "handoff_waiting", waits)
    assert cluster.d.role.live["handoffs_waiting"] == 1
    if how == "cancel":
        for node in (cluster.p, cluster.d):
            cluster.router.cancel(node, waits)
            await cluster.router.hears(node, "freed", waits)
    elif how == "bound elsewhere":
        cluster.router.bind(cluster.p, waits, other, 2)
        await cluster.router.hears(other, "ended", waits)
    elif how == "deadline":
        failed = await cluster.router.hears(cluster.p, "handoff_failed", waits)
        assert "deadline" in failed.message
    else:
        await cluster.p.die()
        await cluster.p.role.senders.stop()
    await until(lambda: cluster.d.role.live["handoffs_waiting"] == 0, "the line to be empty")
    if how in ("deadline", "writer gone"):
        cluster.router.cancel(cluster.p, waits)
    cluster.d.engine.gate.set()
    await ends(cluster, running)


async def test_those_that_wait_do_not_keep_a_prefill_worker_from_others(cluster: Cluster) -> None:
    """Up to half of its pool: four of them are no reason any more to start nothing."""
    await cluster.add_prefill(blocks=16, max_ungranted=1)
    await cluster.add_decode(max_sequences=1)
    other = await cluster.add_decode("d1")
    cluster.d.engine.gate.clear()
    running = chat(cluster, 0.0, output=3)
    cluster.router.direct(cluster.d, running)
    await cluster.router.hears(cluster.d, "started", running)
    waiting = [chat(cluster, 0.0, output=2) for _ in range(8)]
    for spec in waiting:
        await cluster.bound(spec)
        await cluster.router.hears(cluster.p, "handoff_waiting", spec)
    late = chat(cluster, 0.0, output=2)
    cluster.router.prefill(cluster.p, late)
    await asyncio.sleep(0.2)
    assert not cluster.router.heard(cluster.p, "started", late), "those that wait have half of the pool"
    cluster.router.bind(cluster.p, waiting[0], other, 2)
    await cluster.router.hears(cluster.p, "started", late)
    cluster.router.bind(cluster.p, late, other)
    await cluster.router.hears(other, "ended", late)
    cluster.d.engine.gate.set()
    for spec in waiting[1:]:
        await cluster.finished(spec)
