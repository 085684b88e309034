"""Half as much again as a cluster can compute: what is refused, what is admitted, and what is left of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import pytest
import pytest_asyncio

from baton.client.reports import Predictions
from baton.client.types import Completion
from baton.engine.simulated import COSTS
from baton.errors import ResourceExhausted
from tests.cluster.conftest import Running, running, settled

PROMPT, OUTPUT = 128, 4
PROMPT_S = COSTS["smollm2-135m"].prefill(PROMPT, 0, 512)
OBJECTIVE_MS = 8 * PROMPT_S * 1e3
LIMIT_S = 60.0


@pytest_asyncio.fixture
async def cluster() -> AsyncIterator[Running]:
    """One prefill worker is what bounds it."""
    async with running(engine="simulated", model="bytes") as started:
        yield started


@dataclass(slots=True)
class Overload:
    """Requests at an even pace, whatever becomes of those before."""

    running: Running
    seconds: float
    served: list[Completion] = field(default_factory=list)
    refused: list[ResourceExhausted] = field(default_factory=list)

    async def run(self) -> None:
        """Until all have ended."""
        pause_s = PROMPT_S / 1.5
        start = asyncio.get_running_loop().time()
        async with asyncio.TaskGroup() as group:
            for index in range(round(self.seconds / pause_s)):
                await asyncio.sleep(start + index * pause_s - asyncio.get_running_loop().time())
                group.create_task(self._one(index))

    async def _one(self, index: int) -> None:
        try:
            served = await self.running.client.complete(
                token_ids=[(index >> 4 * place) % 16 for place in range(PROMPT)],
                max_tokens=OUTPUT,
                ignore_eos=True,
                ttft_ms=OBJECTIVE_MS,
                when_unmet="refuse",
                timeout=LIMIT_S,
            )
        except ResourceExhausted as error:
            self.refused.append(error)
        else:
            self.served.append(served)


async def test_beyond_capacity_some_are_refused_with_a_reason_and_the_others_are_served(cluster: Running) -> None:
    load = await overload(cluster, seconds=2.0)
    assert load.served
    assert load.refused
    for refusal in load.refused:
        assert refusal.constraint in ("ttft", "others")
        assert refusal.retry_after_s is not None
        assert 0 < refusal.retry_after_s < LIMIT_S
    assert all(served.finished.slo is not None for served in load.served)
    found = await predictions(cluster)
    assert 0 < found.promised <= len(load.served)
    assert 0 <= found.kept <= found.promised
    counters = (await cluster.client.status()).counters
    assert counters["requests_refused"] == len(load.refused)


@pytest.mark.nightly
async def test_beyond_capacity_most_of_those_that_were_admitted_are_in_time(cluster: Running) -> None:
    """Shares, which another program on the machine can spoil."""
    load = await overload(cluster, seconds=6.0)
    count = len(load.served) + len(load.refused)
    assert len(load.refused) >= count / 10, "a third more than fits"
    assert len(load.served) >= count / 3, "what fits is served"
    kept = [served.finished.slo is not None and served.finished.slo.ttft_kept for served in load.served]
    assert sum(map(bool, kept)) >= 0.85 * len(kept)
    found = await predictions(cluster)
    # Not those whose first token the decode worker brought sooner.
    assert 0.9 * len(load.served) <= found.promised <= len(load.served)
    assert found.kept >= 0.85 * found.promised
    assert 0 <= found.error < 1


async def overload(cluster: Running, seconds: float) -> Overload:
    load = Overload(cluster, seconds)
    async with asyncio.timeout(LIMIT_S):
        await load.run()
    await settled(cluster)
    return load


async def predictions(cluster: Running) -> Predictions:
    """What the prefill worker's first tokens came to, as the router counts it since it started."""
    (worker,) = (entry for entry in await cluster.client.workers() if entry.roles == ("prefill",))
    assert worker.predictions is not None
    return worker.predictions
