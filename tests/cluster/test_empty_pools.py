"""A pool whose last worker dies, in a cluster of real processes that simulate."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Any

import pytest

from baton.client import Client
from baton.client.types import Path
from baton.errors import Unavailable
from tests.cluster.conftest import Running, running, settled

pytestmark = pytest.mark.asyncio


async def kill(cluster: Running, name: str) -> None:
    child = next(child for child in cluster.cluster.processes if child.name == name)
    os.kill(child.pid, signal.SIGKILL)
    async with asyncio.timeout(10):
        while name in {worker.name for worker in await cluster.client.workers()}:
            await asyncio.sleep(0.01)


async def path_of(client: Client, seed: int, max_tokens: int = 4) -> Path:
    """Of a prompt that no worker has seen."""
    found = await client.complete(token_ids=[seed] * 100, max_tokens=max_tokens, ignore_eos=True, timeout=10)
    assert len(found.token_ids) == max_tokens
    return found.finished.timeline.path


async def test_an_empty_pool_is_not_an_empty_cluster() -> None:
    lines: list[str] = []
    options: dict[str, Any] = {"engine": "simulated", "model": "bytes", "cost_model": "instant", "path": "adaptive"}
    async with running(sink=lines.append, log_level="info", **options) as cluster:
        client = cluster.client
        assert await path_of(client, 1) is Path.DISAGGREGATED
        assert (await client.workers()).degraded == ()
        await kill(cluster, "prefill-0")
        assert await path_of(client, 2) is Path.DIRECT
        assert await path_of(client, 3, max_tokens=1) is Path.DIRECT
        assert await client.health() == await client.health("readiness") == "serving"
        lacks = "simulated/bytes: no prefill worker; prompts are computed in place, on decode workers"
        status = await client.status()
        assert status.degraded == (await client.workers()).degraded == (lacks,)
        assert status.counters["placed_degraded"] == 2
        async with asyncio.timeout(10):
            while not (told := [line for line in lines if lacks in line]):
                await asyncio.sleep(0.05)
        assert len(told) == 1
        assert '"warning"' in told[0]
        replaced = await cluster.cluster._spawn("prefill-1", "prefill", cluster.cluster._flags_of("prefill", 1))
        await replaced.wait_ready()
        assert await path_of(client, 4) is Path.DISAGGREGATED
        assert (await client.status()).degraded == ()
        await kill(cluster, "decode-0")
        started = asyncio.get_running_loop().time()
        with pytest.raises(Unavailable, match="no decode worker of simulated/bytes is there") as caught:
            await path_of(client, 5)
        assert asyncio.get_running_loop().time() - started < 1.0
        assert (caught.value.constraint, caught.value.retry_after_s) == ("decode_workers", 1.0)
        assert await path_of(client, 6, max_tokens=1) is Path.PREFILL_ONLY
        assert await client.health() == "not_serving"
        await settled(cluster)
