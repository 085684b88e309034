"""Deterministic mode: a sampled request gives the same tokens in any company, and only like workers are paired."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from baton.errors import ConfigError
from tests.cli.runner import baton
from tests.cluster.conftest import Running, prompt_of, running, settled

pytestmark = pytest.mark.asyncio(loop_scope="module")

PROMPT, OUTPUT = 200, 32


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster() -> AsyncIterator[Running]:
    async with running(deterministic=True, dtype="bfloat16", chunk_tokens=96) as started:
        yield started


async def sampled(cluster: Running, prompt: list[int], seed: int) -> tuple[int, ...]:
    completion = await cluster.client.complete(
        token_ids=prompt, temperature=1.0, top_p=0.95, seed=seed, max_tokens=OUTPUT, ignore_eos=True, timeout=120
    )
    return completion.token_ids


@pytest.mark.parametrize(("others", "longest"), [(6, 60), pytest.param(20, 200, marks=pytest.mark.nightly)])
async def test_a_request_draws_the_same_tokens_in_any_company(cluster: Running, others: int, longest: int) -> None:
    """Alone, then amid others of other lengths, with a cached prefix."""
    wanted = await sampled(cluster, prompt_of(PROMPT), seed=7)
    company = [prompt_of(10 + index * longest // others, seed=others) for index in range(others)]
    tasks = [asyncio.create_task(sampled(cluster, prompt, seed=index)) for index, prompt in enumerate(company)]
    found = await sampled(cluster, prompt_of(PROMPT), seed=7)
    await asyncio.gather(*tasks)
    assert found == wanted
    assert await sampled(cluster, prompt_of(PROMPT), seed=8) != wanted
    await settled(cluster)


@pytest.mark.nightly
async def test_torch_is_refused_at_start_in_one_line() -> None:
    with pytest.raises(ConfigError, match="deterministic: needs the native kernels; torch") as caught:
        async with running(kernels="torch", deterministic=True):
            pass
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "model.deterministic: false differs from true"),
        pytest.param(
            ("--deterministic", "--weights", "bf16"),
            "model.weights: bf16 differs from auto",
            marks=pytest.mark.nightly,
        ),
    ],
)
async def test_a_worker_that_computes_otherwise_is_refused_by_name(
    cluster: Running, flags: tuple[str, ...], message: str
) -> None:
    always = ("--router", cluster.cluster.address, "--dtype", "bfloat16", "--pool-tokens", "1024")
    done = await baton("decode", *always, *flags, "--log-level", "error")
    assert done.status != 0
    assert message in done.error_line
