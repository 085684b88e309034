"""Transports as settings ask for them, between real workers: what arrives, and what the timeline says of it."""

from __future__ import annotations

import asyncio

import pytest

from baton.model import KvLayout
from tests.cluster.conftest import Running, prompt_of, running, settled
from tests.cluster.reference import NEAR_IN_BF16, assert_greedy
from tests.kvtransfer.conftest import needs_nixl

pytestmark = pytest.mark.asyncio(loop_scope="package")

BLOCK = KvLayout(layers=30, kv_heads=3, head_dim=64, dtype="bfloat16").block_bytes
PROMPT, OUTPUT = 40 * 16 + 5, 16


async def check(cluster: Running, transport: str) -> None:
    """Each block is sent once, what the decode worker holds already is not sent again, and what is read from the blocks
    is what was written."""
    first, again = [
        await cluster.client.complete(
            token_ids=prompt_of(PROMPT), temperature=0.0, max_tokens=OUTPUT, ignore_eos=True, timeout=60
        )
        for _ in range(2)
    ]
    for completion, sent in ((first, 41), (again, 1)):
        await asyncio.to_thread(assert_greedy, prompt_of(PROMPT), completion.token_ids, NEAR_IN_BF16)
        timeline = completion.finished.timeline
        assert timeline.transport == transport
        assert (timeline.transfer_blocks, timeline.transfer_cached_blocks) == (sent, 41 - sent)
        assert timeline.transfer_bytes == sent * BLOCK
        assert timeline.transfer_ms is not None
        assert timeline.transfer_exposed_ms is not None
        assert timeline.transfer_ms > 0
        assert timeline.transfer_exposed_ms <= timeline.total_ms
    pairs = {worker.name: worker.load.pairs for worker in await cluster.client.workers()}
    assert pairs == {"prefill-0": {transport: 1}, "decode-0": {}}
    (pair,) = (pair for status in await cluster.statuses() for pair in status.pairs)
    assert (pair.peer, pair.transport, pair.handoffs) == ("decode-0", transport, 0)
    await settled(cluster)


async def test_tcp_with_tls_and_checksums_brings_each_block_once(native_over_tcp: Running) -> None:
    await check(native_over_tcp, "tcp")


@needs_nixl
async def test_nixl_brings_each_block_once() -> None:
    async with running("--checksums", transport="nixl", dtype="bfloat16") as cluster:
        await check(cluster, "nixl")
