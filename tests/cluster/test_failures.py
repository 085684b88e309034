"""Clients that leave, workers that die: nothing stays behind, and all others go on."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from contextlib import aclosing
from typing import Any

import pytest

from baton.client.types import Accepted, Completion, Event, Finished, Tokens
from baton.errors import BatonError, DeadlineExceeded, Unavailable
from tests.cluster.conftest import Running, prompt_of, running, settled

pytestmark = pytest.mark.asyncio(loop_scope="package")

OUTPUT = 300
"""Tokens of a stream that is to be interrupted: it lasts until the last of several prompts is computed."""


async def stream_until(cluster: Running, length: int, enough: Callable[[Event], bool]) -> None:
    """Leaves a long stream at the first event that is `enough`."""
    events = cluster.client.generate(token_ids=prompt_of(length), max_tokens=400, ignore_eos=True, timeout=60)
    async with aclosing(events):
        async for event in events:
            if enough(event):
                return
    raise AssertionError("the stream ended first")


@pytest.mark.parametrize("length", [20, 1500])
async def test_a_client_that_leaves_while_queued_or_computing_leaves_nothing(plain: Running, length: int) -> None:
    await stream_until(plain, length, lambda event: isinstance(event, Accepted))
    await settled(plain)


async def test_a_client_that_leaves_between_chunks_leaves_nothing(plain: Running) -> None:
    events = plain.client.generate(token_ids=prompt_of(3000, 1), max_tokens=400, timeout=60)
    async with aclosing(events):
        assert isinstance(await anext(events), Accepted)
        async with asyncio.timeout(30):
            while not any(status.live.get("grants") for status in await plain.statuses()):
                await asyncio.sleep(0.02)  # the grant comes while the first chunks compute
    await settled(plain)


async def test_a_client_that_leaves_after_the_first_token_leaves_nothing(plain: Running) -> None:
    await stream_until(plain, 200, lambda event: isinstance(event, Tokens))
    await settled(plain)


async def test_a_client_that_leaves_while_decoding_leaves_nothing(plain: Running) -> None:
    await stream_until(plain, 40, lambda event: isinstance(event, Tokens) and event.position > 45)
    await settled(plain)


async def test_many_leave_at_once_and_the_next_request_is_served(plain: Running) -> None:
    leaving = [stream_until(plain, 1000, lambda event: isinstance(event, Accepted)) for _ in range(10)]
    await asyncio.gather(*leaving)
    completion = await plain.client.complete(token_ids=prompt_of(10), max_tokens=4, ignore_eos=True, timeout=30)
    assert len(completion.token_ids) == 4
    await settled(plain)


async def test_a_deadline_ends_the_stream_and_frees_everything(plain: Running) -> None:
    with pytest.raises(DeadlineExceeded):
        await plain.client.complete(token_ids=prompt_of(3000, 2), max_tokens=400, ignore_eos=True, timeout=0.5)
    await settled(plain)


Options = dict[str, Any]
EITHER_ENGINE = pytest.mark.parametrize(
    "options",
    [{"engine": "simulated", "sim_speed": 4.0}, pytest.param({"engine": "model"}, marks=pytest.mark.nightly)],
    ids=["simulated", "model"],
)
"""Simulated: real processes, streams and transfers, each step reads all of its KV; only the arithmetic is left out."""


@EITHER_ENGINE
async def test_a_full_decode_pool_is_waited_for(options: Options) -> None:
    """Two sequences that together outgrow the decode pool: one makes room, and goes on where it was."""
    async with running(prefill=1, decode=1, pool_tokens=1024, max_sequences=4, **options) as small:

        async def one(seed: int) -> Completion:
            return await small.client.complete(
                token_ids=prompt_of(200, seed), max_tokens=400, ignore_eos=True, timeout=120
            )

        completions = await asyncio.gather(one(1), one(2))
        assert [len(completion.token_ids) for completion in completions] == [400, 400]
        assert sum(completion.finished.timeline.preemptions for completion in completions) >= 1
        assert max(completion.finished.timeline.handoffs for completion in completions) == 1
        await settled(small)


async def outcome(cluster: Running, seed: int) -> Completion | BatonError:
    try:
        return await cluster.client.complete(
            token_ids=prompt_of(60, seed), max_tokens=OUTPUT, ignore_eos=True, timeout=120
        )
    except BatonError as error:
        return error


def pid_of(cluster: Running, name: str) -> int:
    return next(child.pid for child in cluster.cluster.processes if child.name == name)


async def decoding(cluster: Running, streams: list[asyncio.Task[Completion | BatonError]]) -> None:
    """Until every stream's sequence is resident on a decode worker, all at the same time."""
    async with asyncio.timeout(60):
        while sum(status.live.get("residents", 0) for status in await cluster.statuses()) < len(streams):
            early = [stream.result() for stream in streams if stream.done()]
            assert not early, f"streams ended before the last was decoding: {early}"
            await asyncio.sleep(0.02)


@EITHER_ENGINE
async def test_a_killed_decode_worker_ends_its_streams_where_no_other_is_left(options: Options) -> None:
    async with running(prefill=1, decode=1, **options) as pair:
        streams = [asyncio.create_task(outcome(pair, seed)) for seed in range(3)]
        await decoding(pair, streams)
        killed_at = asyncio.get_running_loop().time()
        os.kill(pid_of(pair, "decode-0"), signal.SIGKILL)
        results = await asyncio.gather(*streams)
        assert asyncio.get_running_loop().time() - killed_at < 2.0, "at once"
        assert all(isinstance(error, Unavailable) and "decode-0" in str(error) for error in results), results
        await settled(pair)


@EITHER_ENGINE
async def test_a_killed_prefill_worker_leaves_decoding_streams_alone(options: Options) -> None:
    async with running(prefill=2, decode=1, **options) as pair:
        streams = [asyncio.create_task(outcome(pair, seed)) for seed in range(4)]
        await decoding(pair, streams)
        os.kill(pid_of(pair, "prefill-0"), signal.SIGKILL)
        results = await asyncio.gather(*streams)
        assert all(isinstance(result, Completion) and len(result.token_ids) == OUTPUT for result in results)
        await settled(pair)
        after = await outcome(pair, 9)
        assert isinstance(after, Completion)
        assert after.finished.timeline.prefill_worker == "prefill-1"


@EITHER_ENGINE
async def test_a_killed_prefill_worker_ends_what_it_computes(options: Options) -> None:
    async with running(prefill=1, decode=1, chunk_tokens=64, **options) as pair:

        async def long() -> Completion:
            return await pair.client.complete(token_ids=prompt_of(3000), max_tokens=10, timeout=60)

        stream = asyncio.create_task(long())
        async with asyncio.timeout(30):
            while not any(status.live.get("grants") for status in await pair.statuses()):
                await asyncio.sleep(0.02)
        os.kill(pid_of(pair, "prefill-0"), signal.SIGKILL)
        with pytest.raises(Unavailable, match="prefill-0"):
            await stream
        await settled(pair)
        with pytest.raises(Unavailable, match="prefill"):
            await pair.client.complete(token_ids=prompt_of(5), max_tokens=1, timeout=10)


@EITHER_ENGINE
async def test_a_router_that_dies_frees_the_workers(options: Options) -> None:
    async with running(prefill=1, decode=1, **options) as pair:
        stream = asyncio.create_task(outcome(pair, 1))
        await decoding(pair, [stream])
        os.kill(pid_of(pair, "router"), signal.SIGKILL)
        assert isinstance(await stream, Unavailable)
        async with asyncio.timeout(20):
            while any(status.pool and status.pool.held for status in await pair.statuses()):
                await asyncio.sleep(0.05)


async def test_finished_is_the_last_event(plain: Running) -> None:
    events = [event async for event in plain.client.generate(token_ids=prompt_of(9), max_tokens=5)]
    assert isinstance(events[0], Accepted)
    assert isinstance(events[-1], Finished)
    assert sum(isinstance(event, Finished) for event in events) == 1
