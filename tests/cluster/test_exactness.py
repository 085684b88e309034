"""Greedy output through router, prefill worker, handoff and decode worker is that of the reference, token for token."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from baton.client.types import Completion
from tests.cluster.conftest import Running, prompt_of, running, settled
from tests.cluster.reference import assert_greedy

pytestmark = pytest.mark.asyncio(loop_scope="module")

LENGTHS = (1, 2, 3, 15, 16, 17, 31, 32, 33, 64, 100, 127, 128, 129, 200, 255, 300, 400, 513, 1000, 3000)
OUTPUT = 64
CHUNK = 256
"""Smaller than the longer prompts, so that they are computed, and handed over, in chunks."""


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["shm", "tcp"])
async def cluster(request: pytest.FixtureRequest) -> AsyncIterator[Running]:
    flags = {"transport": request.param, "dtype": "float32", "chunk_tokens": CHUNK}
    async with running(prefill=1, decode=1, **flags) as started:
        yield started


async def complete(cluster: Running, length: int) -> Completion:
    return await cluster.client.complete(
        token_ids=prompt_of(length), temperature=0.0, max_tokens=OUTPUT, ignore_eos=True, timeout=240
    )


async def test_output_equals_the_reference(cluster: Running) -> None:
    first = await asyncio.gather(*(complete(cluster, length) for length in LENGTHS))
    again = await asyncio.gather(*(complete(cluster, length) for length in LENGTHS))
    for length, fresh, cached in zip(LENGTHS, first, again, strict=True):
        for completion in (fresh, cached):
            assert len(completion.token_ids) == OUTPUT
            await asyncio.to_thread(assert_greedy, prompt_of(length), completion.token_ids)
            timeline = completion.finished.timeline
            assert timeline.path == "disaggregated"
            assert timeline.transport == cluster.cluster.config.transport
        assert cached.finished.usage.cached_prompt_tokens == (length - 1) // 16 * 16
        assert cached.finished.timeline.transfer_cached_blocks >= (length - 1) // 16
    await settled(cluster)
