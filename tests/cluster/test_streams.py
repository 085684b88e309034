"""Many streams at once, and every way in which one ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Unpack

import pytest
import pytest_asyncio

from baton.client.types import Completion, FinishReason, Path, RequestOptions, Tokens
from tests.cluster.conftest import Running, idle_counts, no_growth, prompt_of, settled
from tests.cluster.reference import assert_greedy

pytestmark = pytest.mark.asyncio(loop_scope="package")

STREAMS = 64
LENGTHS = (1, 7, 16, 33, 60, 90, 140, 220)


@pytest_asyncio.fixture(autouse=True, loop_scope="package")
async def _empty_afterwards(exact_pairs: Running, plain: Running) -> AsyncIterator[None]:
    yield
    for cluster in (exact_pairs, plain):
        await settled(cluster)


async def test_64_streams_of_mixed_lengths_say_what_the_reference_says(exact_pairs: Running) -> None:
    async def stream(number: int) -> Completion:
        return await exact_pairs.client.complete(
            token_ids=prompt_of(LENGTHS[number % 8], number % 16),
            temperature=0.0,
            max_tokens=4 + number % 13,
            ignore_eos=True,
            timeout=180,
        )

    completions = await asyncio.gather(*map(stream, range(STREAMS)))
    for number, completion in enumerate(completions):
        assert len(completion.token_ids) == 4 + number % 13
        assert completion.finished.reason is FinishReason.LENGTH
    longest_first = sorted(enumerate(completions), key=lambda entry: -len(entry[1].token_ids))
    for number, completion in longest_first:
        await asyncio.to_thread(assert_greedy, prompt_of(LENGTHS[number % 8], number % 16), completion.token_ids)
    used = {completion.finished.timeline.prefill_worker for completion in completions}
    used |= {completion.finished.timeline.decode_worker for completion in completions}
    assert used == {"prefill-0", "prefill-1", "decode-0", "decode-1"}
    counts = await idle_counts(exact_pairs)
    assert all(count["sessions"] == (4 if name == "router" else 1) for name, count in counts.items())


@pytest.mark.nightly
async def test_twice_as_many_streams_leave_no_more_behind(exact_pairs: Running) -> None:
    """As with workers that simulate, of which every run does the same (`test_simulated`)."""

    async def fresh(number: int, seed: int) -> None:
        prompt = prompt_of(20 + number, seed=seed)
        await exact_pairs.client.complete(token_ids=prompt, temperature=0.0, max_tokens=3, ignore_eos=True, timeout=180)

    await asyncio.gather(*(fresh(number, 500) for number in range(STREAMS)))
    before = await idle_counts(exact_pairs)
    for seed in (1000, 2000):
        await asyncio.gather(*(fresh(number, seed) for number in range(STREAMS)))
    await no_growth(exact_pairs, before, writers=1)


async def test_the_router_knows_what_the_workers_have_cached(exact_pairs: Running) -> None:
    await exact_pairs.client.complete(token_ids=prompt_of(100, seed=77), max_tokens=20, ignore_eos=True, timeout=60)
    await settled(exact_pairs)
    async with asyncio.timeout(10):
        while True:
            statuses = await exact_pairs.statuses(router=True)
            cached = sum(status.pool.cached for status in statuses if status.pool is not None)
            known = next(status.live["prefix_blocks"] for status in statuses if not status.roles)
            if known == cached > 0:
                break
            await asyncio.sleep(0.05)


async def test_positions_are_consecutive_and_ids_match_text(plain: Running) -> None:
    runs = [
        event
        async for event in plain.client.generate(prompt="Once upon a time", temperature=0.0, max_tokens=20)
        if isinstance(event, Tokens)
    ]
    position = runs[0].position
    for run in runs:
        assert run.position == position
        position += len(run.ids)


async def continuation(plain: Running, outputs: int, **options: Unpack[RequestOptions]) -> Completion:
    options |= {"temperature": 0.0, "max_tokens": outputs}
    return await plain.client.complete(prompt="The capital of France is", timeout=60, **options)


async def test_max_tokens_one_needs_no_decode_worker(plain: Running) -> None:
    completion = await continuation(plain, 1)
    assert len(completion.token_ids) == 1
    assert completion.finished.reason is FinishReason.LENGTH
    assert completion.finished.timeline.path is Path.PREFILL_ONLY
    assert completion.finished.timeline.decode_worker == ""
    assert completion.finished.timeline.tpot_ms is None


async def test_a_stop_token_as_first_token_ends_on_the_prefill_worker(plain: Running) -> None:
    first = (await continuation(plain, 1)).token_ids[0]
    completion = await continuation(plain, 16, stop_token_ids=[first])
    assert completion.token_ids == (first,)
    assert completion.finished.reason is FinishReason.STOP_TOKEN
    assert completion.finished.timeline.path is Path.PREFILL_ONLY


async def test_a_stop_token_later_ends_on_the_decode_worker(plain: Running) -> None:
    free = await continuation(plain, 16, ignore_eos=True)
    stop = next(
        token for index, token in enumerate(free.token_ids) if index >= 3 and token not in free.token_ids[:index]
    )
    completion = await continuation(plain, 16, stop_token_ids=[stop], ignore_eos=True)
    assert completion.token_ids == free.token_ids[: free.token_ids.index(stop) + 1]
    assert completion.finished.reason is FinishReason.STOP_TOKEN
    assert completion.finished.timeline.path is Path.DISAGGREGATED


async def test_the_end_of_the_sequence_ends_the_answer(plain: Running) -> None:
    question = [("user", "What is the capital of France?")]
    completion = await plain.client.complete(messages=question, temperature=0.0, timeout=60)
    assert completion.text == "The capital of France is Paris."
    assert completion.finished.reason is FinishReason.EOS
    assert completion.token_ids[-1] == 2


async def test_an_end_as_first_token_is_an_empty_answer(plain: Running) -> None:
    """All that is left to say after a finished answer is that it is finished."""
    asked = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    completion = await plain.client.complete(asked + "The capital of France is Paris.", temperature=0.0, timeout=60)
    assert completion.token_ids == (2,)
    assert completion.text == ""
    assert completion.finished.reason is FinishReason.EOS
    assert completion.finished.usage.output_tokens == 1
    assert completion.finished.timeline.path is Path.PREFILL_ONLY


async def test_a_stop_string_across_tokens_ends_the_text_before_it(plain: Running) -> None:
    free = await continuation(plain, 12, ignore_eos=True)
    text = free.text
    stop = text[len(text) // 3 : len(text) // 3 + 6]
    assert len(stop) == 6
    completion = await continuation(plain, 12, stop=[stop], ignore_eos=True)
    assert completion.text == text[: text.index(stop)]
    assert completion.finished.reason is FinishReason.STOP_STRING
    assert completion.finished.stop == stop
    assert completion.finished.usage.output_tokens == len(completion.token_ids) <= 12


async def test_a_stop_string_in_the_first_token_ends_the_text_before_it(plain: Running) -> None:
    first = (await continuation(plain, 1)).text
    completion = await continuation(plain, 12, stop=[first.strip() or first])
    assert completion.text == first[: first.index(first.strip() or first)]
    assert completion.finished.reason is FinishReason.STOP_STRING
    assert completion.finished.usage.output_tokens == 1


async def test_a_split_character_comes_whole(plain: Running) -> None:
    """The emoji is several tokens of single bytes; a prompt that repeats it makes the model go on with it."""
    pieces = [
        event
        async for event in plain.client.generate(
            prompt="Repeat after me: 🎉🎉🎉🎉🎉🎉🎉🎉🎉🎉🎉🎉", temperature=0.0, max_tokens=24, ignore_eos=True
        )
        if isinstance(event, Tokens)
    ]
    text = "".join(piece.text for piece in pieces)
    assert "🎉🎉🎉🎉" in text
    assert any(not piece.text for piece in pieces), "ids go out at once, text waits for the rest of its character"
    assert "\ufffd" not in text[:-1]
