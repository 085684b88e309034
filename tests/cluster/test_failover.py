"""Workers that are killed under streams: each stream is complete, and token for token the one of an undisturbed run."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest

from baton.client.types import Finished, Tokens
from baton.launch.child import Child
from baton.spec import TokenLogprobs
from tests.cluster.conftest import Running, prompt_of, running, settled
from tests.hostile.pauses import suspended

STREAMS = 20
SAMPLED: dict[str, Any] = {
    "temperature": 0.9, "top_k": 50, "repetition_penalty": 1.1, "frequency_penalty": 0.2, "logprobs": 2,
}  # fmt: skip


class Heard:
    """A stream as its client heard it."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.text = ""
        self.logprobs: list[TokenLogprobs] = []
        self.finished: Finished | None = None

    def same_as(self, other: Heard) -> bool:
        assert self.finished is not None
        assert other.finished is not None
        ends = (self.finished.reason, self.finished.stop, self.finished.usage.output_tokens)
        theirs = (other.finished.reason, other.finished.stop, other.finished.usage.output_tokens)
        return (self.ids, self.text, self.logprobs, ends) == (other.ids, other.text, other.logprobs, theirs)


async def hear(cluster: Running, seed: int, heard: Heard, **options: Any) -> None:
    """Raises for a token that comes twice or out of order."""
    prompt = prompt_of(40, seed)
    async for event in cluster.client.generate(token_ids=prompt, seed=seed, timeout=120, **options):
        if isinstance(event, Tokens):
            assert event.position == len(prompt) + len(heard.ids) or not event.ids
            heard.ids += event.ids
            heard.text += event.text
            heard.logprobs += event.logprobs
        if isinstance(event, Finished):
            heard.finished = event


async def all_heard(cluster: Running, **options: Any) -> list[Heard]:
    streams = [Heard() for _ in range(STREAMS)]
    await asyncio.gather(*(hear(cluster, seed, heard, **options) for seed, heard in enumerate(streams)))
    return streams


async def killed_under_streams(cluster: Running, victim: Child, tokens: int, **options: Any) -> list[Heard]:
    """The process is killed once the streams together have so many tokens."""
    streams = [Heard() for _ in range(STREAMS)]
    tasks = [asyncio.create_task(hear(cluster, seed, heard, **options)) for seed, heard in enumerate(streams)]
    async with asyncio.timeout(120):
        while sum(len(heard.ids) for heard in streams) < tokens:
            await asyncio.sleep(0.002)
        victim.kill()
        await asyncio.gather(*tasks)
    return streams


def process_of(cluster: Running, name: str) -> Child:
    return next(child for child in cluster.cluster.processes if child.name == name)


@pytest.mark.parametrize("name", ["decode-0", "prefill-0"])
async def test_a_killed_worker_costs_no_stream_a_token(name: str) -> None:
    options: dict[str, Any] = {"max_tokens": 150, "ignore_eos": True, "temperature": 1.0}
    at = random.Random(name).randrange(0 if name == "prefill-0" else STREAMS, STREAMS * 100)
    simulated: dict[str, Any] = {"engine": "simulated", "sim_speed": 4.0, "prefill": 2, "decode": 2}
    async with running(pool_tokens=32_768, **simulated) as cluster:
        undisturbed = await all_heard(cluster, **options)
        disturbed = await killed_under_streams(cluster, process_of(cluster, name), at, **options)
        await settled(cluster)
        counters = (await cluster.client.status()).counters
    for before, after in zip(undisturbed, disturbed, strict=True):
        assert after.same_as(before)
    attempts = [heard.finished.timeline.attempts for heard in disturbed if heard.finished is not None]
    assert max(attempts) <= 2
    assert counters.get("failovers", 0) == sum(attempts) - STREAMS
    if name == "decode-0":
        assert sum(attempts) > STREAMS, "some streams were there"


async def test_sampled_output_of_the_model_is_the_same_as_without_a_death() -> None:
    """In deterministic mode: penalties, log-probabilities and stop strings go on as if nothing had happened."""
    options: dict[str, Any] = {"max_tokens": 32, "stop": [" the", "\n\n"], **SAMPLED}
    async with running(deterministic=True, prefill=2, decode=2, weights="int8", chunk_tokens=128) as cluster:
        undisturbed = await all_heard(cluster, **options)
        total = sum(len(heard.ids) for heard in undisturbed)
        victim = process_of(cluster, "decode-0")
        disturbed = await killed_under_streams(
            cluster, victim, random.Random(1).randrange(total // 4, total // 2), **options
        )
        await settled(cluster)
        failovers = (await cluster.client.status()).counters.get("failovers", 0)
    assert failovers, "some streams were there"
    for before, after in zip(undisturbed, disturbed, strict=True):
        assert after.same_as(before), (before.text, after.text)


async def test_streams_leave_a_stopped_worker_which_serves_again_when_it_goes_on() -> None:
    """It is noticed in 1.5 s; the rest of the longest gap is queue and computing."""
    options: dict[str, Any] = {"max_tokens": 300, "ignore_eos": True, "temperature": 1.0}
    simulated: dict[str, Any] = {"engine": "simulated", "sim_speed": 2.0, "prefill": 2, "decode": 2}
    async with running(pool_tokens=32_768, **simulated) as cluster:
        streams = [Heard() for _ in range(STREAMS)]
        tasks = [asyncio.create_task(hear(cluster, seed, heard, **options)) for seed, heard in enumerate(streams)]
        async with asyncio.timeout(60):
            while sum(len(heard.ids) for heard in streams) < STREAMS * 20:
                await asyncio.sleep(0.002)
            async with suspended([process_of(cluster, "decode-0")]):
                await asyncio.gather(*tasks)
            while not all(worker.attached for worker in await cluster.client.workers()):
                await asyncio.sleep(0.05)
            await settled(cluster)
        counters = (await cluster.client.status()).counters
        assert counters["failovers"] >= 1
        assert all(len(heard.ids) == 300 for heard in streams)
        after = await all_heard(cluster, **options | {"max_tokens": 5})
        assert {heard.finished.timeline.decode_worker for heard in after if heard.finished} == {"decode-0", "decode-1"}
