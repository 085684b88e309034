"""A process that was suspended, and wakes: its own absence is nobody's death. Timeouts are a tenth of the real ones."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import pytest

from baton.client import Client
from baton.errors import Unavailable
from tests.cluster.conftest import running, settled
from tests.hostile.pauses import Stream, frozen_client, streams_through, suspended

pytestmark = pytest.mark.asyncio(loop_scope="module")

PROGRAM = (sys.executable, "-m", "tests.launch.hurried")
PAUSE_S = 1.5
"""Three times the silence after which a peer is judged, and two leases and a half."""
HOLD_S = 6.0


async def test_a_suspended_router_and_a_suspended_machine_lose_no_stream() -> None:
    """The decode worker goes on without the router until that is far behind, and pauses."""
    options: dict[str, Any] = {"engine": "simulated", "model": "bytes", "pool_tokens": 65_536, "cost_model": "instant"}
    async with running("--router-hold-s", str(HOLD_S), program=PROGRAM, **options) as cluster:
        pauses = [(cluster.cluster.processes[:1], PAUSE_S), (cluster.cluster.processes, PAUSE_S)]
        assert await streams_through(cluster, pauses, count=6, tokens=3000) == []
        assert "workers_lost" not in (await cluster.client.status()).counters
        counters = {name: value for status in await cluster.statuses() for name, value in status.counters.items()}
        assert counters["sequences_paused"] >= 6
        assert "routers_lost" not in counters
        await settled(cluster)


async def test_a_frozen_client_a_router_that_does_not_wake_and_one_that_died_are_given_up() -> None:
    """The client is noticed by gRPC's pings, a silent router when it was waited for long enough, a dead one within the
    grace time. Each time nothing is left behind, and who wakes after all is told."""
    options: dict[str, Any] = {"engine": "simulated", "model": "bytes"}
    async with running("--router-hold-s", "1", program=PROGRAM, **options) as cluster:
        router, _, decode = cluster.cluster.processes
        async with frozen_client(cluster.cluster.address), asyncio.timeout(10.0):
            while (await cluster.client.status()).live["requests"]:
                await asyncio.sleep(0.05)
        await settled(cluster)
        async with asyncio.timeout(30.0), Client(decode.address) as worker:
            stream = Stream(cluster.client, 1, 8000)
            while not stream.under_way:
                await asyncio.sleep(0.01)
            async with suspended([router]):
                while (await worker.status()).live["residents"]:
                    await asyncio.sleep(0.05)
                assert (await worker.status()).counters["routers_silent"] == 1
            with pytest.raises(Unavailable):
                await stream.task
            while sum(worker.attached for worker in await cluster.client.workers()) < 2:
                await asyncio.sleep(0.05)  # they register again
            stream = Stream(cluster.client, 2, 8000)
            while not stream.under_way:
                await asyncio.sleep(0.01)
            lost = (await worker.status()).counters["routers_lost"]
            router.kill()
            with pytest.raises(Unavailable):
                await stream.task
            while (await worker.status()).live["residents"]:
                await asyncio.sleep(0.02)
            counters = (await worker.status()).counters
            assert (counters["routers_lost"], counters["routers_silent"]) == (lost + 1, 1)
