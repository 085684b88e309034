"""Clients that leave, run out of time or stop early, over real processes: no counter that means a fault moves."""

from __future__ import annotations

import asyncio
import contextlib
import random
from typing import Any

import pytest

from baton.errors import BatonError
from tests.alarms import raised
from tests.cluster.conftest import Running, running, settled

REQUESTS = 100
AT_ONCE = 32
SMALL_POOL = 1024
"""In tokens: a few sequences fill it, so that handoffs are refused and bound anew."""


async def one_request(cluster: Running, seed: int) -> None:
    """Ends of its own accord, or at some moment."""
    dice = random.Random(seed)
    prompt = [dice.randrange(97, 123) for _ in range(dice.randint(1, 300))]
    options: dict[str, Any] = {
        "token_ids": prompt,
        "max_tokens": dice.randint(1, 60),
        "seed": seed,
        "timeout": dice.choice([60, 60, dice.uniform(0.005, 0.1)]),
        "stop": dice.choice([[], ["a", "e"], ["no such text"]]),
    }
    events = cluster.client.generate(**options)

    async def read() -> None:
        async for _ in events:
            pass

    with contextlib.suppress(BatonError, TimeoutError):  # refused, or out of time
        async with asyncio.timeout(dice.choice([60, dice.uniform(0.0, 0.1)])):
            await read()
    await events.aclose()


@pytest.mark.parametrize("transport", ["tcp", pytest.param("shm", marks=pytest.mark.nightly)])
async def test_no_ordinary_end_raises_an_alarm(transport: str) -> None:
    simulated: dict[str, Any] = {"engine": "simulated", "model": "bytes", "cost_model": "instant"}
    said: list[str] = []
    logs: dict[str, Any] = {"sink": said.append, "log_format": "json"}
    async with running(
        prefill=1, decode=1, transport=transport, pool_tokens=SMALL_POOL, **simulated, **logs
    ) as cluster:
        room = asyncio.Semaphore(AT_ONCE)

        async def within(seed: int) -> None:
            async with room:
                await one_request(cluster, seed)

        await asyncio.gather(*map(within, range(REQUESTS)))
        await settled(cluster)
        statuses = await cluster.statuses(router=True)
        assert {status.name: raised(status.counters) for status in statuses} == {s.name: {} for s in statuses}
        assert [line for line in said if '"level": "error"' in line or '"event": "write ' in line] == []
        assert sum(status.counters.get("cancels", 0) for status in statuses), "some were cut off"
