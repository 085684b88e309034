"""Transports as settings ask for them, between real workers: what arrives, and what the timeline says of it."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import pytest

from baton.launch.cluster import PROGRAM
from baton.model import KvLayout
from tests.cli.runner import baton
from tests.cluster.conftest import SETTLE_S, Running, prompt_of, running, settled
from tests.cluster.reference import NEAR_IN_BF16, assert_greedy
from tests.faults.namespaces import why_no_pids
from tests.kvtransfer.conftest import needs_nixl

pytestmark = pytest.mark.asyncio(loop_scope="package")

BLOCK = KvLayout(layers=30, kv_heads=3, head_dim=64, dtype="bfloat16").block_bytes
NOTE = "shm: decode-0 refused the connection: its process is in a PID namespace that the receiver can't see into"
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
    await check_pair(cluster, transport)
    await settled(cluster)


async def check_pair(cluster: Running, transport: str, note: str = "") -> None:
    """What router and worker say of the one pair; a load report takes a moment."""
    async with asyncio.timeout(SETTLE_S):
        while not (loads := {worker.name: worker.load for worker in await cluster.client.workers()})["prefill-0"].pairs:
            await asyncio.sleep(0.02)
    assert {name: load.pairs for name, load in loads.items()} == {"prefill-0": {transport: 1}, "decode-0": {}}
    notes = {"prefill-0": {transport: note} if note else {}, "decode-0": {}}
    assert {name: load.pair_notes for name, load in loads.items()} == notes
    (pair,) = (pair for status in await cluster.statuses() for pair in status.pairs)
    assert (pair.peer, pair.transport, pair.handoffs, pair.note) == ("decode-0", transport, 0, note)


async def test_tcp_with_tls_and_checksums_brings_each_block_once(native_over_tcp: Running) -> None:
    await check(native_over_tcp, "tcp")


@pytest.mark.skipif(bool(why_no_pids()), reason="no PID namespaces here")
async def test_processes_that_do_not_see_each_other_use_tcp_and_say_why() -> None:
    """As in containers of one pod, with the default transport. `tests/faults/test_reach.py` compares the KV."""
    apart = sys.executable, "-m", "tests.faults.namespaces", *PROGRAM
    said: list[str] = []
    simulated: dict[str, Any] = {"engine": "simulated", "model": "bytes", "cost_model": "instant"}
    async with running(program=apart, sink=said.append, **simulated) as cluster:
        completion = await cluster.client.complete(prompt="a b c" * 20, max_tokens=3, timeout=60)
        assert completion.finished.timeline.transport == "tcp"
        await settled(cluster)
        await check_pair(cluster, "tcp", NOTE)
        table = await baton("workers", "--server", cluster.cluster.address)
        assert table.out.splitlines()[-1] == f"prefill-0 uses tcp: {NOTE}"
        (prefill,) = (child.address for child in cluster.cluster.processes if child.role == "prefill")
        status = await baton("status", prefill)
        assert f"tcp, 0 under way; {NOTE}" in " ".join(status.out.split())
    (up,) = (json.loads(line.partition(" ")[2]) for line in said if "control stream up" in line)
    assert (up["level"], up["transport"], up["not_used"]) == ("warning", "tcp", NOTE)


@needs_nixl
async def test_nixl_brings_each_block_once() -> None:
    async with running("--checksums", transport="nixl", dtype="bfloat16") as cluster:
        await check(cluster, "nixl")
