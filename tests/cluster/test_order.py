"""Which prompt goes first on a worker that has more than it can compute: the urgent, in the end each, and never one
that was cancelled."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Unpack

import pytest
import pytest_asyncio

from baton.client.types import Accepted, Completion, RequestOptions, Tokens
from baton.worker.prompt_queue import AGEING_S, PRIORITY_S
from tests.cluster.conftest import Running, prompt_of, running, settled

pytestmark = pytest.mark.asyncio(loop_scope="package")

CHUNK = 128
LONG, MEDIUM, SHORT = 384, 64, 16
QUEUE, FLOOD = 10, 4
LIMIT_S = 60.0
SEEDS = itertools.count()


@pytest_asyncio.fixture(scope="module", loop_scope="package")
async def colocated() -> AsyncIterator[Running]:
    async with running(colocated=1, engine="simulated", chunk_tokens=CHUNK) as started:
        yield started


def fresh(length: int) -> list[int]:
    """A prompt of which nothing is cached."""
    return prompt_of(length, next(SEEDS))


@dataclass(slots=True)
class Crowd:
    """Long prompts under way; `firsts` are the numbers of those whose first token is there."""

    running: Running
    firsts: list[int] = field(default_factory=list)
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)

    async def send(self, count: int) -> None:
        """They queue in this order, every other one with a relaxed objective; when this returns the first one has had
        a chunk."""
        before = await count_of(self.running, "prompt_tokens")
        for index in range(count):
            accepted = asyncio.Event()
            self._tasks.append(asyncio.create_task(self._one(index, accepted)))
            await accepted.wait()
        while await count_of(self.running, "prompt_tokens") == before:
            await asyncio.sleep(0.01)

    async def cancel(self) -> None:
        """All that are still under way."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _one(self, index: int, accepted: asyncio.Event) -> None:
        options: RequestOptions = {"token_ids": fresh(LONG), "max_tokens": 2}
        if index % 2:
            options["ttft_ms"] = LIMIT_S * 1e3
        async with aclosing(self.running.client.generate(timeout=LIMIT_S, **options)) as stream:
            async for event in stream:
                if isinstance(event, Accepted):
                    accepted.set()
                elif isinstance(event, Tokens) and index not in self.firsts:
                    self.firsts.append(index)


@asynccontextmanager
async def crowd(cluster: Running) -> AsyncIterator[Crowd]:
    """Nothing of it is left afterwards."""
    made = Crowd(cluster)
    async with asyncio.timeout(LIMIT_S):
        try:
            yield made
        finally:
            await made.cancel()
    await settled(cluster)


async def count_of(cluster: Running, counter: str) -> int:
    """Of all workers together, since they started."""
    return sum(status.counters.get(counter, 0) for status in await cluster.statuses())


async def first_token(cluster: Running, length: int, **options: Unpack[RequestOptions]) -> Completion:
    """A fresh prompt whose first token is its last: it is over when that is there."""
    options |= {"token_ids": fresh(length), "max_tokens": 1}
    return await cluster.client.complete(timeout=LIMIT_S, **options)


async def time_of_a_long_one(cluster: Running) -> float:
    """Milliseconds to the first token, with nothing else there."""
    await first_token(cluster, LONG)
    return (await first_token(cluster, LONG)).timeline.ttft_ms


async def an_urgent_one_goes_first(cluster: Running) -> None:
    objective_ms = 4 * await time_of_a_long_one(cluster)  # those before it take ten times as long as one
    async with crowd(cluster) as longs:
        await longs.send(QUEUE)
        before = len(longs.firsts)
        urgent = await first_token(cluster, SHORT, ttft_ms=objective_ms, when_unmet="refuse")
        overtaken_by = len(longs.firsts) - before
    assert urgent.finished.slo is not None
    assert urgent.finished.slo.ttft_kept, f"{urgent.timeline.ttft_ms:.0f} ms of {objective_ms:.0f} ms"
    assert overtaken_by <= 1, "only one whose last chunk was under way"


async def test_an_urgent_prompt_behind_ten_long_ones_goes_first_and_is_in_time(plain: Running) -> None:
    await an_urgent_one_goes_first(plain)


async def test_an_urgent_prompt_goes_first_where_prompts_are_computed_in_place(colocated: Running) -> None:
    await an_urgent_one_goes_first(colocated)


@dataclass(slots=True)
class Flood:
    """Urgent prompts without end, always as many at once; when each was sent and when its token came."""

    running: Running
    ttft_ms: float
    ended: list[tuple[float, float]] = field(default_factory=list)

    async def run(self) -> None:
        """Until cancelled."""
        async with asyncio.TaskGroup() as group:
            for _ in range(FLOOD):
                group.create_task(self._client())

    async def _client(self) -> None:
        while True:
            sent_at = time.monotonic()
            await first_token(self.running, MEDIUM, ttft_ms=self.ttft_ms)
            self.ended.append((sent_at, time.monotonic()))


async def test_long_prompts_end_while_a_flood_of_urgent_ones_goes_on(plain: Running) -> None:
    alone_ms = await time_of_a_long_one(plain)
    flood = Flood(plain, 2 * alone_ms)
    flooding = asyncio.create_task(flood.run())
    steps = 8  # of priority: they stand for as many seconds of waiting, which a test has no time for
    try:
        async with asyncio.timeout(LIMIT_S):
            while len(flood.ended) < FLOOD:
                await asyncio.sleep(0.01)
            due_at = time.monotonic() + AGEING_S - steps * PRIORITY_S
            relaxed = asyncio.create_task(first_token(plain, LONG, ttft_ms=5 * alone_ms))
            await first_token(plain, LONG, priority=steps)
            ended_at = time.monotonic()
            await relaxed
            assert not flooding.done()
    finally:
        flooding.cancel()
        await asyncio.gather(flooding, return_exceptions=True)
    overtaking = [came_at for sent_at, came_at in flood.ended if came_at < due_at]
    assert len(overtaking) > FLOOD, "the flood goes first for a while"
    later = [sent_at for sent_at, came_at in flood.ended if sent_at > due_at and came_at < ended_at]
    assert len(later) <= FLOOD, "those that shared its last chunk"
    await settled(plain)


async def test_ten_cancelled_long_prompts_cost_the_next_one_a_chunk_at_most(plain: Running) -> None:
    wasted = await count_of(plain, "prompt_tokens_wasted")
    async with crowd(plain) as longs:
        await longs.send(QUEUE)
        useful = await count_of(plain, "prompt_tokens")
        await longs.cancel()
        await first_token(plain, SHORT)
        # What was computed for the cancelled, and with it what the short one waited for.
        assert await count_of(plain, "prompt_tokens_wasted") - wasted <= CHUNK
        assert await count_of(plain, "prompt_tokens") - useful <= CHUNK + SHORT
        assert await count_of(plain, "late_steps") == 0
        assert not longs.firsts
