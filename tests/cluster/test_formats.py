"""Formats of weights and KV through a whole cluster, and the memory that a worker takes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest
import pytest_asyncio

from baton.engine.native import library
from baton.engine.native.build import NativeUnavailable
from baton.launch.child import Child
from baton.model import KvLayout
from tests.cli.runner import baton
from tests.cluster.conftest import Running, running, settled

pytestmark = pytest.mark.asyncio(loop_scope="module")

LAYOUT = KvLayout(layers=30, kv_heads=3, head_dim=64, dtype="int8")
OVERHEAD_BYTES = 350_000_000
"""What a decode worker may take beside weights and pool: the interpreter, torch, gRPC, the tokeniser."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster() -> AsyncIterator[Running]:
    """8-bit KV on both sides; bf16 weights where prompts are computed, the file's own grid where tokens are."""
    try:
        library.load()
    except NativeUnavailable as error:
        pytest.skip(str(error))
    async with running(kv_dtype="int8", prefill_weights="bf16", kernels="native") as started:
        yield started


def child(cluster: Running, role: str) -> Child:
    return next(child for child in cluster.cluster.processes if child.role == role)


def memory_of(pid: int, name: str) -> int:
    """A line of the process's status, in bytes."""
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(lines[name].split()[0]) * 1024


def largest_areas(pid: int, count: int = 30) -> str:
    """What takes a process's memory, the largest first: where to look when it is too much."""
    areas = sorted(psutil.Process(pid).memory_maps(), key=lambda area: area.rss, reverse=True)
    return "\n".join(
        f"{area.rss / 1e6:6.1f} MB, {area.private_dirty / 1e6:6.1f} own  {area.path}" for area in areas[:count]
    )


async def test_resident_memory_is_weights_and_pool_and_little_else(cluster: Running) -> None:
    """By the kernel's own account: pages of the pool are shared memory, the rest is the process's."""
    decode = next(status for status in await cluster.statuses() if status.roles == ("decode",))
    assert decode.pool is not None
    assert decode.pool.bytes == decode.pool.blocks * LAYOUT.block_bytes
    pid = child(cluster, "decode").pid
    resident, shared = memory_of(pid, "VmRSS"), memory_of(pid, "RssShmem")
    assert shared >= decode.pool.bytes, "the pool is in memory from the start"
    overhead = resident - decode.weight_bytes - decode.pool.bytes
    print(f"beside weights and pool: {overhead / 1e6:.0f} MB\n{largest_areas(pid)}")
    assert overhead <= OVERHEAD_BYTES
    assert abs(decode.resident_bytes - resident) < 20_000_000
    mapped = {Path(area.path).name for area in psutil.Process(pid).memory_maps()}
    assert not [name for name in mapped if name.endswith((".gguf", ".safetensors"))], "the file is let go of"


async def test_each_role_has_its_own_weights(cluster: Running) -> None:
    prefill, decode = sorted(await cluster.statuses(), key=lambda status: status.roles, reverse=True)
    assert prefill.weight_bytes > 1.8 * decode.weight_bytes > 0


async def test_8_bit_kv_is_handed_over_and_says_the_same(cluster: Running) -> None:
    question = [("user", "What is the capital of France?")]
    completion = await cluster.client.complete(messages=question, temperature=0.0, timeout=60)
    assert completion.text == "The capital of France is Paris."
    timeline = completion.finished.timeline
    assert timeline.transfer_blocks > 0
    assert timeline.transfer_bytes == timeline.transfer_blocks * LAYOUT.block_bytes
    await settled(cluster)


async def test_a_worker_with_other_kv_is_refused_by_name(cluster: Running) -> None:
    result = await baton("decode", "--router", cluster.cluster.address, "--pool-tokens", "64", "--dtype", "bfloat16")
    assert result.status != 0
    last = result.err.splitlines()[-1]
    assert last.startswith("baton: model.kv_layout.dtype: bfloat16 differs from int8")
