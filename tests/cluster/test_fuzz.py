"""Almost valid requests against a router beside healthy streams: every one is answered, and nobody else notices."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.cluster.conftest import Running, running, settled
from tests.hostile.fuzz import Found, attack_apart
from tests.hostile.mutations import call_of
from tests.hostile.others import Others, p99_ms

CALM_S = 4.0
WARM_UP, GROWTH, FLAT = 2_000, 1.10, 1.03
"""Requests until the router's memory is judged, how much it may grow from then on, and over the last half of them."""
BOUND_MS = 100.0
CLUSTER: dict[str, Any] = {"engine": "simulated", "model": "smollm2-135m", "path": "adaptive"} | {
    "pool_tokens": 65_536, "sim_kv_bytes_per_token": 64, "sim_speed": 10.0,
    "router_flags": ("--explained-requests", "64"),
}  # fmt: skip
"""With room for the longest answers, which some mutations ask for, and a context that is computed in no time: in one of
131,072 tokens the mutated prompts wait minutes for each other, and come to their deadline. What the router keeps for
`baton explain` is full after the first 2,000: else its filling, some 20 MB, would hide what grows."""


@dataclass
class Attacked:
    """What came of an attack: the others' gaps without and with it, and the router's memory after each part (bytes)."""

    found: list[Found] = field(default_factory=list)
    calm: list[float] = field(default_factory=list)
    under: list[float] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)


async def attack(cluster: Running, parts: list[tuple[int, float]]) -> Attacked:
    """Parts of (requests, seconds), each at most so many and so long."""
    result, others, first = Attacked(), Others(cluster), 0
    async with others.busy():
        await asyncio.sleep(1.0)
        others.gaps.clear()
        await asyncio.sleep(CALM_S)
        result.calm, others.gaps = others.gaps, result.under
        for count, seconds in parts:
            result.found.append(await attack_apart(cluster.cluster.address, first, count, seconds))
            first += result.found[-1].sent
            result.memory.append((await cluster.client.status()).resident_bytes)
    return result


async def check(cluster: Running, result: Attacked) -> None:
    faults = {seed: (text, call_of(seed).method) for found in result.found for seed, text in found.faults.items()}
    assert not faults
    await settled(cluster)
    counters = (await cluster.client.status()).counters
    assert {"workers_lost", "requests_poisonous", "unknown_frames", "cancels_unanswered"}.isdisjoint(counters)
    for status in await cluster.statuses():
        assert {"commands_failed", "results_failed", "sequences_failed", "routers_lost"}.isdisjoint(status.counters)
        assert status.pool is not None
        assert status.pool.integrity_error == ""
    seen = {name for found in result.found for name in found.statuses}
    assert {"OK", "INVALID_ARGUMENT"} <= seen, "some are served, and some are not"


async def test_30_seconds_of_mutated_requests_cost_nobody_else_anything() -> None:
    async with running(**CLUSTER) as cluster:
        result = await attack(cluster, [(100_000, 22.0)])
        await check(cluster, result)
    assert result.found[0].sent > 300, "also on a slow machine"
    assert p99_ms(result.under) <= p99_ms(result.calm) + 5 * BOUND_MS, "the fine bound is the nightly test's"


@pytest.mark.nightly
@pytest.mark.timeout(2000)
async def test_20_000_mutated_requests_leave_the_router_as_it_was() -> None:
    async with running(**CLUSTER) as cluster:
        result = await attack(cluster, [(WARM_UP, 600.0), (9_000, 600.0), (9_000, 600.0)])
        await check(cluster, result)
    assert sum(found.sent for found in result.found) >= 20_000
    warm, half, end = result.memory
    assert end <= GROWTH * warm, result.memory
    assert end <= FLAT * half, result.memory
    assert p99_ms(result.under) <= p99_ms(result.calm) + BOUND_MS
