"""Chats without a limit share a decode pool by what they really write, and end right when it runs dry."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

import pytest

from baton.client import Client, Completion
from tests.cluster.conftest import Running, running

pytestmark = pytest.mark.asyncio(loop_scope="module")
CHATS = 32
POLL_S = 0.2
TIGHT_TOKENS = 608
"""A tenth of what 32 prompts of 40 tokens and outputs of 150 need."""
SPREADS = [0, 100]
"""Of the outputs, around 150 tokens."""


@dataclass(slots=True)
class Watched:
    """What a load did to the decode workers: the most residents at once, and their counters at the end."""

    completions: list[Completion]
    most: int = 0
    counters: dict[str, int] = field(default_factory=dict)


def settings(spread: int, pool_tokens: int = 32_768) -> dict[str, Any]:
    """The default pool, unless told otherwise."""
    return {
        "engine": "simulated",
        "sim_eos_after": 150,
        "sim_eos_spread": spread,
        "pool_tokens": pool_tokens,
        "sim_speed": 4.0,
    }


async def chat(client: Client, number: int) -> Completion:
    text = f"Number {number}: tell me about the weather of the last week, and of the next one"
    return await client.complete(messages=[("user", text)], seed=number, timeout=120.0)


async def chats(running: Running) -> Watched:
    """All at once, without `max_tokens`."""
    watched, done = Watched([]), asyncio.Event()

    async def watch() -> None:
        while not done.is_set():
            found = [status for status in await running.statuses() if status.roles == ("decode",)]
            watched.most = max(watched.most, sum(status.live["residents"] for status in found))
            await asyncio.sleep(POLL_S)

    watcher = asyncio.create_task(watch())
    watched.completions = await asyncio.gather(*(chat(running.client, number) for number in range(CHATS)))
    done.set()
    await watcher
    for status in await running.statuses(router=True):
        assert status.pool is None or not status.pool.integrity_error
        for name, count in status.counters.items():
            watched.counters[name] = watched.counters.get(name, 0) + count
    return watched


@pytest.mark.parametrize("spread", SPREADS)
async def test_most_chats_decode_at_once_in_the_default_pool(spread: int) -> None:
    """Also at first, when nothing is known of how long outputs become."""
    async with running(path="adaptive", **settings(spread)) as started:
        watched = await chats(started)
        assert watched.most >= 24
        assert watched.counters.get("sequences_preempted", 0) <= 0.05 * CHATS
        assert {completion.finished.reason.value for completion in watched.completions} == {"eos"}


@pytest.mark.parametrize("pool_tokens", [TIGHT_TOKENS, 1_600])
async def test_in_a_pool_that_is_too_small_all_end_right(pool_tokens: int) -> None:
    """In the smaller one they take turns. In the larger one more get in than can end there, because nothing is known
    yet of how long they become, and some have to make room."""
    grown = {"sim_eos_after": 400, "sim_eos_spread": 100} if pool_tokens > TIGHT_TOKENS else {}
    fast = {"sim_speed": 20.0}  # memory is the subject, not time
    async with running(**settings(100, pool_tokens=32_768) | grown | fast) as roomy:
        expected = await chats(roomy)
    async with running(**settings(100, pool_tokens) | grown | fast) as tight:
        watched = await chats(tight)
    assert [c.token_ids for c in watched.completions] == [c.token_ids for c in expected.completions]
    preempted = sum(completion.timeline.preemptions for completion in watched.completions)
    assert watched.counters.get("sequences_preempted", 0) == watched.counters.get("preemptions", 0) == preempted
    assert (preempted > 0) == bool(grown)
