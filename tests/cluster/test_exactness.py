"""Greedy output through router, prefill worker, handoff and decode worker is that of the reference, token for token.

Torch computes in float32, so that its output equals the reference's; the native kernels in bf16, so that theirs is one
of the reference's near ties, and to the letter what they give in one process.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from baton.client.types import Completion
from baton.engine.files.card import describe
from baton.engine.files.digests import cache_dir
from baton.engine.files.models import EMBEDDED_MODEL, resolve
from baton.engine.native.engine import NativeEngine
from baton.engine.offline import OfflinePrompt, generate
from tests.cluster.conftest import Running, prompt_of, running, settled
from tests.cluster.reference import NEAR_IN_BF16, assert_greedy

pytestmark = pytest.mark.asyncio(loop_scope="package")

LENGTHS = (1, 2, 3, 15, 16, 17, 31, 32, 33, 64, 100, 127, 128, 129, 200, 255, 300, 400, 513, 1000, 3000)
FEWER = (1, 2, 16, 17, 128, 129, 300, 513)
OUTPUT, LONG_OUTPUT = 32, 64
CHUNK = 256
"""Smaller than the longer prompts, so that they are computed, and handed over, in chunks."""


@pytest_asyncio.fixture(
    scope="module", loop_scope="package", params=["shm", pytest.param("tcp", marks=pytest.mark.nightly)]
)
async def cluster(request: pytest.FixtureRequest) -> AsyncIterator[Running]:
    flags = {"transport": request.param, "dtype": "float32", "chunk_tokens": CHUNK}
    async with running(prefill=1, decode=1, **flags) as started:
        yield started


async def complete(cluster: Running, length: int, output: int) -> Completion:
    return await cluster.client.complete(
        token_ids=prompt_of(length), temperature=0.0, max_tokens=output, ignore_eos=True, timeout=240
    )


@pytest.mark.parametrize(
    ("lengths", "output"),
    [(FEWER, OUTPUT), pytest.param(LENGTHS, LONG_OUTPUT, marks=pytest.mark.nightly)],
    ids=["few", "all"],
)
async def test_output_equals_the_reference(cluster: Running, lengths: tuple[int, ...], output: int) -> None:
    first = await asyncio.gather(*(complete(cluster, length, output) for length in lengths))
    again = await asyncio.gather(*(complete(cluster, length, output) for length in lengths))
    for length, fresh, cached in zip(lengths, first, again, strict=True):
        for completion in (fresh, cached):
            assert len(completion.token_ids) == output
            await asyncio.to_thread(assert_greedy, prompt_of(length), completion.token_ids)
            timeline = completion.finished.timeline
            assert timeline.path == "disaggregated"
            assert timeline.transport == cluster.cluster.config.transport
        assert cached.finished.usage.cached_prompt_tokens == (length - 1) // 16 * 16
        assert cached.finished.timeline.transfer_cached_blocks >= (length - 1) // 16
    await settled(cluster)


@pytest.mark.parametrize("output", [OUTPUT, pytest.param(LONG_OUTPUT, marks=pytest.mark.nightly)])
async def test_native_output_is_near_the_reference_and_that_of_one_process(
    native_over_tcp: Running, output: int
) -> None:
    description = describe(resolve(EMBEDDED_MODEL), "bfloat16")
    engine = NativeEngine.load(description, blocks=256, weights="bf16")
    alone = generate(
        engine, [OfflinePrompt(tuple(prompt_of(length)), max_tokens=output) for length in FEWER], blocks=256
    )
    found = await asyncio.gather(*(complete(native_over_tcp, length, output) for length in FEWER))
    await settled(native_over_tcp)
    for length, served, wanted in zip(FEWER, found, alone, strict=True):
        assert list(served.token_ids) == wanted.tokens
        await asyncio.to_thread(assert_greedy, prompt_of(length), served.token_ids, NEAR_IN_BF16)


@pytest.mark.parametrize("output", [OUTPUT // 2, pytest.param(LONG_OUTPUT, marks=pytest.mark.nightly)])
async def test_without_a_compiler_workers_say_so_once_and_answer_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: int
) -> None:
    """No compiler in the path and nothing compiled in the cache: as on a machine that never had one."""
    model = resolve(EMBEDDED_MODEL).path
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / model.name).symlink_to(model)
    (tmp_path / "digests").symlink_to(cache_dir() / "digests")
    monkeypatch.setenv("BATON_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", os.devnull)
    monkeypatch.delenv("CXX", raising=False)
    said: list[str] = []
    async with running(sink=said.append, dtype="bfloat16", chunk_tokens=CHUNK, log_format="json") as cluster:
        found = await asyncio.gather(*(complete(cluster, length, output) for length in FEWER[1:5:2]))
        await settled(cluster)
    for length, served in zip(FEWER[1:5:2], found, strict=True):
        await asyncio.to_thread(assert_greedy, prompt_of(length), served.token_ids, NEAR_IN_BF16)
    for worker in ("prefill-0", "decode-0"):
        warnings = [line for line in said if line.startswith(f"({worker})") and "computing with torch" in line]
        assert len(warnings) == 1, said
        assert "there is no C++ compiler" in warnings[0]
    assert not (tmp_path / "native").exists()
