"""Requests that are large in every way, to a cluster of real processes: each is answered, and others hardly notice."""

from __future__ import annotations

import asyncio

import pytest

from baton.rpc import net
from tests.cluster.conftest import running, settled
from tests.hostile.long_texts import Attack, strike, too_long, within_limits
from tests.hostile.others import Others

pytestmark = pytest.mark.asyncio(loop_scope="module")

REFUSALS = {"INVALID_ARGUMENT", "RESOURCE_EXHAUSTED"}
LONGEST_S = 2.0
"""Of silence, on a machine that others use too; the fine bound is in `tests.hostile`. Held for three seconds, a router
loses its workers."""


async def test_no_worker_is_lost_and_no_stream_stalls_under_long_texts() -> None:
    refused, served = too_long(), within_limits()
    async with running(engine="simulated", prefill=1, decode=1) as cluster:
        others = Others(cluster)

        async def attack(attacks: list[Attack]) -> list[str]:
            async with net.open_channel(cluster.cluster.address) as channel:
                return [await strike(channel, attack) for attack in attacks]

        async with others.busy():
            ends = await asyncio.gather(attack(refused), attack(refused[::-1]), attack(served))
        counters = (await cluster.client.status()).counters
        await settled(cluster)
    assert {*ends[0], *ends[1]} <= REFUSALS
    for given, end in zip(served, ends[2], strict=True):
        assert end in ({"OK"} if given.method == "Tokenize" else REFUSALS), given.name
    assert counters["long_texts"] == len(served), "what is refused by its bytes is not handed on"
    assert {"workers_lost", "long_texts_lost", "long_texts_refused"}.isdisjoint(counters)
    assert max(others.gaps) < LONGEST_S
    assert max(others.waits) < LONGEST_S
