"""A request during which workers die, one after the other, in a cluster of real processes that simulate."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Any

import pytest

from baton.errors import Internal
from tests.cluster.conftest import Running, prompt_of, running, settled

pytestmark = pytest.mark.asyncio


async def kill_the_granting(cluster: Running) -> str:
    """Waits until a decode worker has granted room to a prompt that is still computed, and kills that."""
    async with asyncio.timeout(10):
        while not (found := [status.name for status in await cluster.statuses() if status.live.get("grants")]):
            await asyncio.sleep(0.01)
    (name,) = found
    os.kill(next(child.pid for child in cluster.cluster.processes if child.name == name), signal.SIGKILL)
    return name


@pytest.mark.nightly
async def test_a_request_that_two_decode_workers_died_with_is_not_tried_on_the_third() -> None:
    options: dict[str, Any] = {"prefill": 1, "decode": 3, "chunk_tokens": 64, "sim_speed": 0.5}
    async with running(engine="simulated", **options) as cluster:
        prompt = prompt_of(3000)
        stream = asyncio.create_task(cluster.client.complete(token_ids=prompt, max_tokens=10, timeout=30))
        killed = [await kill_the_granting(cluster) for _ in range(2)]
        with pytest.raises(Internal, match=f"workers {' and '.join(killed)} died while they had this request"):
            await stream
        await settled(cluster)
        status = await cluster.client.status()
        assert status.counters["requests_poisonous"] == 1
        assert status.counters["handoffs"] == 2
        completion = await cluster.client.complete(token_ids=[1, 2, 3], max_tokens=3, ignore_eos=True, timeout=10)
        assert completion.finished.timeline.decode_worker not in killed
