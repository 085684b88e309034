"""Prompts that are computed where they are decoded, and objectives, on a real cluster."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import pytest
import pytest_asyncio

from baton.errors import ResourceExhausted
from tests.cli.runner import baton
from tests.cluster.conftest import Running, prompt_of, running, settled
from tests.cluster.reference import assert_greedy

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def colocated() -> AsyncIterator[Running]:
    async with running(colocated=1, dtype="float32", chunk_tokens=128) as started:
        yield started


async def test_in_place_the_output_equals_the_reference(colocated: Running) -> None:
    lengths = (1, 17, 129, 400)
    requests = [
        colocated.client.complete(
            token_ids=prompt_of(length), temperature=0.0, max_tokens=24, ignore_eos=True, timeout=240
        )
        for length in (*lengths, *lengths)
    ]
    for length, completion in zip((*lengths, *lengths), await asyncio.gather(*requests), strict=True):
        assert completion.finished.timeline.path == "direct"
        assert completion.finished.timeline.transport == ""
        await asyncio.to_thread(assert_greedy, prompt_of(length), completion.token_ids)
    await settled(colocated)


async def test_one_token_and_a_cancel_leave_nothing(colocated: Running) -> None:
    one = await colocated.client.complete(token_ids=prompt_of(40), max_tokens=1, timeout=60)
    assert one.finished.timeline.path == "direct"
    async with asyncio.timeout(60):
        long = colocated.client.generate(token_ids=prompt_of(900), max_tokens=500, ignore_eos=True)
        async with aclosing(long) as stream:
            async for _ in stream:
                break
    await settled(colocated)


async def test_the_promise_is_there_from_the_first_request_and_what_cannot_be_kept_is_refused(
    colocated: Running,
) -> None:
    completion = await colocated.client.complete(token_ids=prompt_of(300), max_tokens=8, ttft_ms=60_000, timeout=60)
    accepted = completion.accepted
    assert accepted.predicted_ttft_ms is not None
    assert accepted.predicted_tpot_ms is not None
    assert 0 < accepted.predicted_ttft_ms < 60_000
    assert completion.finished.slo is not None
    assert completion.finished.slo.ttft_kept
    unmet: list[tuple[Any, str]] = [({"ttft_ms": 0.5}, "ttft"), ({"tpot_ms": 0.01}, "tpot")]
    told = await baton("explain", accepted.request_id, "--server", colocated.cluster.address)
    assert told.status == 0
    assert told.out.startswith("prompt: colocated-0 (direct): in place")
    assert "promised ttft" in told.out
    unknown = await baton("explain", "nobody", "--server", colocated.cluster.address)
    assert (unknown.status, unknown.error_line) == (1, "no request 'nobody' is remembered here")
    for objective, constraint in unmet:
        with pytest.raises(ResourceExhausted) as refused:
            await colocated.client.complete(
                token_ids=prompt_of(300), max_tokens=8, when_unmet="refuse", timeout=60, **objective
            )
        assert refused.value.constraint == constraint
        assert refused.value.retry_after_s is not None
        served = await colocated.client.complete(token_ids=prompt_of(30), max_tokens=8, timeout=60, **objective)
        assert served.finished.usage.output_tokens > 0
    await settled(colocated)
