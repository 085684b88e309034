"""Whole clusters whose workers simulate: real processes and transfers, far more requests than cores compute."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from baton.client import Client
from baton.client.types import Finished, Tokens
from tests.cli.runner import baton
from tests.cluster.conftest import Running, idle_counts, no_growth, prompt_of, running, settled

pytestmark = pytest.mark.asyncio(loop_scope="module")

CONCURRENT = 128
GROWTH_BYTES = 10_000_000
"""A leaked request (ids, protobuf, tasks) is more than 2 kB, so 10,000 of them are more than this."""


async def ask(client: Client, index: int) -> str:
    """One request of a kind that its number decides; how it ended."""
    chance = random.Random(index)
    length, prompt = chance.choice((1, 2, 5, 12)), [chance.randrange(256) for _ in range(chance.randrange(1, 200))]
    leave_after = chance.randrange(length) if index % 10 == 0 else None
    positions: list[int] = []
    async for event in client.generate(token_ids=prompt, seed=index, max_tokens=length, timeout=120):
        if isinstance(event, Tokens):
            positions += range(event.position, event.position + len(event.ids))
            if leave_after is not None and len(positions) > leave_after:
                return "left"
        if isinstance(event, Finished):
            assert event.timeline.simulated
            assert positions == [*range(len(prompt), len(prompt) + length)]
            return event.reason.value
    raise AssertionError("the stream ended without a word")


async def all_end(cluster: Running, count: int) -> None:
    numbers = iter(range(count))
    ends: Counter[str] = Counter()

    async def work() -> None:
        for index in numbers:
            ends[await ask(cluster.client, index)] += 1

    await asyncio.gather(*(work() for _ in range(CONCURRENT)))
    assert ends == {"left": count / 10, "length": count * 9 / 10}
    await settled(cluster)
    for status in await cluster.statuses():
        assert "commands_failed" not in status.counters
    unexpected = {"requests_failed", "requests_refused", "unknown_frames"} & (
        await cluster.client.status()
    ).counters.keys()
    assert not unexpected


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pairs() -> AsyncIterator[Running]:
    async with running(engine="simulated", model="bytes", cost_model="instant", prefill=2, decode=2) as started:
        yield started


async def test_300_requests_all_end_and_are_not_taken_for_a_models(pairs: Running) -> None:
    assert {worker.model for worker in await pairs.client.workers()} == {"simulated/bytes"}
    await all_end(pairs, 300)
    same = [await pairs.client.complete(token_ids=[1, 2, 3], seed=5, max_tokens=9) for _ in range(2)]
    assert same[0].token_ids == same[1].token_ids


async def test_twice_as_many_streams_leave_no_more_behind(pairs: Running) -> None:
    """Once each pair has its control stream, no task, thread or session is added, but for the second thread of a
    prefill worker that has not written to both decode workers at once yet: one, however often it is asked."""
    await all_at_once(pairs, 500)
    before = await idle_counts(pairs)
    assert all(counts["sessions"] == (4 if name == "router" else 1) for name, counts in before.items())
    for seed in (1000, 2000):
        await all_at_once(pairs, seed)
    await no_growth(pairs, before, writers=1)


async def test_a_second_worker_of_one_name_is_refused(pairs: Running) -> None:
    flags = ("--engine", "simulated", "--model", "bytes", "--cost-model", "instant", "--pool-tokens", "64")
    result = await baton("decode", "--router", pairs.cluster.address, *flags, "--name", "decode-0")
    assert result.status == 2
    assert "'decode-0' is the name of a live worker at" in result.err.splitlines()[-1]
    assert len(await pairs.client.workers()) == 4


async def all_at_once(cluster: Running, seed: int) -> None:
    """64 prompts that share nothing."""

    async def fresh(number: int) -> None:
        prompt = [token % 256 for token in prompt_of(20 + number, seed)]
        await cluster.client.complete(token_ids=prompt, max_tokens=3, ignore_eos=True, timeout=60)

    await asyncio.gather(*map(fresh, range(64)))


@pytest.mark.nightly
async def test_10_000_requests_all_end_and_leave_nothing() -> None:
    async with running(engine="simulated", model="bytes", cost_model="instant", prefill=2, decode=2) as cluster:
        await all_end(cluster, 5_000)  # by then the router remembers as many decisions as it ever will
        before, router, started = await idle_counts(cluster), await cluster.client.status(), time.monotonic()
        await all_end(cluster, 10_000)
        seconds, after = time.monotonic() - started, await cluster.client.status()
        # Threads that write blocks are started as they are needed, up to a bound.
        await no_growth(cluster, {name: counts | {"threads": 64} for name, counts in before.items()})
    sizes = [f"{status.resident_bytes / 1e6:.1f} MB" for status in (router, after)]
    print(f"\n10,000 requests in {seconds:.1f} s; the router's memory: {sizes[0]} before, {sizes[1]} after")
    assert after.resident_bytes - router.resident_bytes <= GROWTH_BYTES


@pytest.mark.skipif(sys.platform != "linux", reason="threads have nice values of their own on Linux")
@pytest.mark.parametrize(("flags", "by"), [((), 5), (("--compute-nice", "0"), 0), (("--compute-nice", "12"), 12)])
async def test_one_thread_of_each_worker_stands_back_for_those_that_pass_messages(
    flags: tuple[str, ...], by: int
) -> None:
    """By less than the highest nice value, should the tests run at one of their own."""
    ours = os.getpriority(os.PRIO_PROCESS, 0)
    async with running(*flags, engine="simulated", model="bytes", cost_model="instant") as cluster:
        assert await ask(cluster.client, 1) == "length"
        for child in cluster.cluster.processes:
            above = []
            for thread in map(int, os.listdir(f"/proc/{child.pid}/task")):
                with contextlib.suppress(ProcessLookupError):  # gRPC's own come and go
                    above.append(os.getpriority(os.PRIO_PROCESS, thread) - ours)
            computing = [by] if by and child.role != "router" else []
            assert [value for value in above if value] == computing, child.name
