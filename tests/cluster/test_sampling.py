"""A seed means the same tokens, whatever the cluster's shape, and without any handoff."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from baton.engine.files.card import describe
from baton.engine.files.models import EMBEDDED_MODEL, resolve
from baton.engine.offline import OfflinePrompt, generate
from baton.engine.torch.engine import TorchEngine
from baton.spec import Sampling
from tests.cluster.conftest import Running, prompt_of, running, settled

pytestmark = pytest.mark.asyncio(loop_scope="package")

OUTPUT = 32
LENGTHS = (5, 40, 150, 300)
SAMPLINGS = (
    Sampling(temperature=0.9, top_k=40, top_p=0.95, seed=11, repetition_penalty=1.2),
    Sampling(temperature=1.3, min_p=0.02, seed=12, presence_penalty=0.5, frequency_penalty=0.3),
    Sampling(temperature=0.7, seed=2**63 + 5, repetition_penalty=1.1, frequency_penalty=-0.2),
)
Case = tuple[int, Sampling]
FEW: list[Case] = list(zip(LENGTHS, itertools.cycle(SAMPLINGS), strict=False))
ALL: list[Case] = list(itertools.product(LENGTHS, SAMPLINGS))


@pytest_asyncio.fixture(scope="module", loop_scope="package")
async def exact_pair() -> AsyncIterator[Running]:
    async with running(dtype="float32", chunk_tokens=128) as started:
        yield started


@pytest.fixture(scope="module", params=["exact_pairs", pytest.param("exact_pair", marks=pytest.mark.nightly)])
def cluster(request: pytest.FixtureRequest) -> Running:
    found: Running = request.getfixturevalue(request.param)
    return found


@pytest.fixture(scope="module")
def engine() -> TorchEngine:
    return TorchEngine.load(describe(resolve(EMBEDDED_MODEL), "float32"), blocks=512)


def alone(engine: TorchEngine, cases: list[Case]) -> list[tuple[int, ...]]:
    """One process, one engine, no handoff."""
    prompts = [OfflinePrompt(tuple(prompt_of(length)), sampling, OUTPUT) for length, sampling in cases]
    return [tuple(completion.tokens) for completion in generate(engine, prompts, blocks=512, chunk_tokens=200)]


async def sampled(cluster: Running, length: int, sampling: Sampling) -> tuple[int, ...]:
    completion = await cluster.client.complete(
        token_ids=prompt_of(length),
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        seed=sampling.seed,
        repetition_penalty=sampling.repetition_penalty,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        max_tokens=OUTPUT,
        ignore_eos=True,
        timeout=120,
    )
    return completion.token_ids


@pytest.mark.parametrize("cases", [FEW, pytest.param(ALL, marks=pytest.mark.nightly)], ids=["few", "all"])
async def test_the_same_seed_draws_the_same_tokens_in_any_shape(
    cluster: Running, engine: TorchEngine, cases: list[Case]
) -> None:
    wanted = await asyncio.to_thread(alone, engine, cases)
    found = await asyncio.gather(*(sampled(cluster, *case) for case in cases))
    assert found == wanted
    await settled(cluster)


async def test_a_minted_seed_repeats_the_output(cluster: Running) -> None:
    client = cluster.client
    first = await client.complete(token_ids=prompt_of(20), max_tokens=24, ignore_eos=True)
    again = await client.complete(token_ids=prompt_of(20), max_tokens=24, ignore_eos=True, seed=first.accepted.seed)
    other = await client.complete(token_ids=prompt_of(20), max_tokens=24, ignore_eos=True)
    assert again.token_ids == first.token_ids
    assert other.accepted.seed != first.accepted.seed
    assert other.token_ids != first.token_ids
