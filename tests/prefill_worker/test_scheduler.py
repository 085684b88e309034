"""Which prompts a prefill step works on."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from baton.cost import LATE_CHUNK, StepCost
from baton.engine.api import Sequence
from prefill_worker.scheduler import LAST_TOKENS, WORTH, PrefillScheduler
from tests.prefill_worker.builders import sequence


def run(scheduler: PrefillScheduler) -> list[tuple[Sequence, int]]:
    """One step, as engine and runner do it."""
    batch = scheduler.pick()
    for work in batch:
        samples = work.samples
        work.sequence.computed += work.count
        if samples:
            work.sequence.tokens.append(99)
    return [(work.sequence, work.count) for work in batch]


def test_nothing_to_do() -> None:
    assert PrefillScheduler(8).pick() == []


def test_a_long_prompt_in_chunks_with_a_short_one_in_the_rest() -> None:
    scheduler = PrefillScheduler(8)
    long, short, last = sequence(20), sequence(3), sequence(6)
    for each in (long, short, last):
        scheduler.add(each)
    assert run(scheduler) == [(long, 8)]
    assert run(scheduler) == [(long, 8)]
    assert run(scheduler) == [(long, 4), (short, 3), (last, 1)]
    assert run(scheduler) == [(last, 5)]
    assert run(scheduler) == []


def test_a_cached_prefix_is_not_computed() -> None:
    scheduler = PrefillScheduler(8)
    cached = sequence(20, computed=16)
    scheduler.add(cached)
    assert run(scheduler) == [(cached, 4)]
    assert run(scheduler) == []


def test_a_late_prompt_is_computed_in_short_steps_and_lets_others_in_between() -> None:
    scheduler = PrefillScheduler(512, lambda: StepCost(0.005, 0.001))
    late, urgent = sequence(300), sequence(100)
    late.late, late.rank, urgent.rank = True, 9.0, 1.0
    scheduler.add(late)
    assert run(scheduler) == [(late, LATE_CHUNK)]
    scheduler.add(urgent)
    assert run(scheduler) == [(urgent, 100)]
    assert run(scheduler) == [(late, LATE_CHUNK)]


def test_removed_between_steps() -> None:
    scheduler = PrefillScheduler(8)
    first, second = sequence(20), sequence(20)
    scheduler.add(first)
    scheduler.add(second)
    run(scheduler)
    scheduler.remove(first.key)
    scheduler.remove(first.key)
    assert run(scheduler) == [(second, 8)]


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(0, 49)), max_size=12), st.integers(1, 30))
def test_every_prompt_is_computed_once_within_the_budget(prompts: list[tuple[int, int]], chunk: int) -> None:
    scheduler = PrefillScheduler(chunk)
    sequences = [sequence(length, min(cached, length - 1)) for length, cached in prompts]
    left = sum(each.remaining for each in sequences)
    for each in sequences:
        scheduler.add(each)
    order = []
    while step := run(scheduler):
        counts = [count for _, count in step]
        assert all(count > 0 for count in counts)
        assert sum(counts) == min(chunk, left)  # no token of the budget is wasted
        left -= sum(counts)
        order += [each.key for each, _ in step if each.output_tokens]
    assert left == 0
    assert order == [each.key for each in sequences]  # oldest first
    assert all(each.output_tokens == 1 for each in sequences)


def test_a_more_urgent_prompt_goes_first_from_the_next_chunk_on() -> None:
    scheduler = PrefillScheduler(8)
    long, urgent = sequence(20), sequence(5)
    long.rank = 2.0
    scheduler.add(long)
    assert run(scheduler) == [(long, 8)]
    urgent.rank = 1.0
    scheduler.add(urgent)
    assert run(scheduler) == [(urgent, 5), (long, 3)]
    assert run(scheduler) == [(long, 8)]


def test_what_is_left_to_send_after_the_last_step_is_short() -> None:
    scheduler = PrefillScheduler(512)
    alone = sequence(1000)
    scheduler.add(alone)
    assert [count for _, count in (run(scheduler) + run(scheduler))] == [512, 1000 - 512 - LAST_TOKENS]
    late = sequence(600)
    scheduler.add(late)
    assert run(scheduler) == [(alone, LAST_TOKENS)], "the first token does not wait for others"
    assert [count for _, count in (run(scheduler) + run(scheduler))] == [512, 88]


def test_in_company_or_short_a_prompt_is_not_cut_for_its_end() -> None:
    scheduler = PrefillScheduler(512)
    first, second = sequence(400), sequence(400)
    scheduler.add(first)
    scheduler.add(second)
    assert run(scheduler) == [(first, 400), (second, 112)]
    scheduler = PrefillScheduler(512)
    short = sequence(WORTH * LAST_TOKENS - 1)
    scheduler.add(short)
    assert run(scheduler) == [(short, WORTH * LAST_TOKENS - 1)]


def test_a_more_urgent_prompt_goes_before_a_last_step() -> None:
    scheduler = PrefillScheduler(512)
    long, urgent = sequence(512), sequence(5)
    long.rank = 2.0
    scheduler.add(long)
    assert run(scheduler) == [(long, 512 - LAST_TOKENS)]
    urgent.rank = 1.0
    scheduler.add(urgent)
    assert run(scheduler) == [(urgent, 5), (long, LAST_TOKENS)]


def test_prompts_share_a_step_only_as_far_as_its_fixed_cost_would_weigh_too_much() -> None:
    scheduler = PrefillScheduler(512, lambda: StepCost(chunk=0.005, per_token=0.001))  # 20 tokens are four times that
    prompts = [sequence(tokens) for tokens in (100, 10, 5, 300, 1)]
    for each in prompts:
        scheduler.add(each)
    first, second, third, fourth, fifth = prompts
    assert run(scheduler) == [(first, 100)]
    assert run(scheduler) == [(second, 10), (third, 5), (fourth, 5)]
    assert run(scheduler) == [(fourth, 295)]
    assert run(scheduler) == [(fifth, 1)]
