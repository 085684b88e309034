"""Every resident, in every step."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest

from baton.cost import ALONE_CHUNK, LATE_CHUNK, LEAST_CHUNK, StepCost
from baton.engine.api import Sequence
from baton.spec import NEVER_STOP
from decode_worker.scheduler import DecodeScheduler, Expected
from tests.prefill_worker.builders import sequence


def resident(prompt: int) -> Sequence:
    made = sequence(prompt, computed=prompt)
    made.tokens.append(7)
    return made


def test_all_residents_one_token_each() -> None:
    scheduler = DecodeScheduler()
    assert scheduler.pick() == []
    sequences = [resident(5), resident(50)]
    for each in sequences:
        scheduler.add(each)
    batch = scheduler.pick()
    assert [(work.sequence, work.count, work.samples) for work in batch] == [(each, 1, True) for each in sequences]


def test_paused_residents_are_left_out_and_owe_nothing_afterwards() -> None:
    """The time of the pause does not count against their objective: no chunk shrinks to make up for it."""
    now = [10.0]
    scheduler = DecodeScheduler(clock=lambda: now[0])
    paused, other = resident(5), resident(6)
    for each in (paused, other):
        each.tpot_s = 0.1
        scheduler.add(each)
    scheduler.paused = frozenset({paused.key})
    assert [work.sequence for work in scheduler.pick()] == [other]
    now[0] += 60.0
    assert [work.sequence for work in scheduler.pick()] == [other]
    scheduler.paused = frozenset()
    assert [work.sequence for work in scheduler.pick()] == [paused, other]
    assert (paused.first_token_at, other.first_token_at) == (70.0, 10.0)


def test_a_resident_that_leaves_while_it_is_paused_is_forgotten() -> None:
    scheduler = DecodeScheduler()
    one = resident(5)
    scheduler.add(one)
    scheduler.paused = frozenset({one.key})
    assert scheduler.pick() == []
    scheduler.remove(one.key)
    scheduler.paused = frozenset()
    assert scheduler.pick() == []


def test_joins_and_leaves_between_steps() -> None:
    scheduler = DecodeScheduler()
    first, second = resident(5), resident(6)
    scheduler.add(first)
    scheduler.add(second)
    scheduler.remove(first.key)
    scheduler.remove(first.key)
    assert [work.sequence for work in scheduler.pick()] == [second]


def still() -> float:
    """No time passes."""
    return 50.0


COST = StepCost(0.002, 0.001, 0.0, 0.005, 0.001, 0.0)


def prompt(length: int, rank: float = 0.0) -> Sequence:
    made = sequence(length)
    made.rank = rank
    return made


def counts(scheduler: DecodeScheduler) -> list[int]:
    """One step, as engine and runner do it."""
    batch = scheduler.pick()
    for work in batch:
        samples = work.samples
        work.sequence.computed += work.count
        if samples:
            work.sequence.tokens.append(9)
    return [work.count for work in batch]


def test_without_residents_a_prompt_gets_whole_chunks() -> None:
    scheduler = DecodeScheduler(32, lambda: COST, clock=still)
    scheduler.add(prompt(70))
    assert [counts(scheduler) for _ in range(4)] == [[32], [32], [6], [1]]


def test_without_residents_its_own_objective_stands_for_those_who_may_come() -> None:
    scheduler = DecodeScheduler(512, lambda: COST, clock=still)
    long = prompt(600)
    long.tpot_s = 0.150
    scheduler.add(long)
    assert counts(scheduler)[0] in (132, 133), "0.9 * 150 ms less 2 ms that a chunk costs anyway"
    long.tpot_s = 0.010
    assert counts(scheduler) == [ALONE_CHUNK]


def test_a_chunk_is_smaller_where_such_steps_take_longer_than_their_parts() -> None:
    scheduler = DecodeScheduler(512, lambda: replace(COST, mixed=1.5), clock=still)
    strict = resident(5)
    strict.tpot_s = 0.050
    scheduler.add(strict)
    scheduler.add(prompt(300))
    # 45 ms over 1.5 less a step of 6 ms leaves 24.
    assert counts(scheduler)[1] in (23, 24)


def test_a_chunk_takes_what_the_strictest_objective_leaves() -> None:
    scheduler = DecodeScheduler(512, lambda: COST, clock=still)
    strict, loose = resident(5), resident(5)
    strict.tpot_s, loose.tpot_s = 0.050, 1.0
    for each in (strict, loose, prompt(300)):
        scheduler.add(each)
    # 0.9 * 50 ms less a step of 7 ms leaves 38 tokens of 1 ms each.
    assert counts(scheduler) in ([1, 1, 37], [1, 1, 38])


def test_who_is_behind_its_objective_gets_shorter_steps_until_that_is_made_good() -> None:
    """A sequence waited 20 of its 50 ms for the step that was under way when it was handed over."""
    now = 50.0
    scheduler = DecodeScheduler(512, lambda: COST, clock=lambda: now)
    late, other = resident(5), resident(5)
    late.tpot_s, late.first_token_at, other.tpot_s = 0.050, now - 0.020, 0.050
    late.rule = NEVER_STOP
    for each in (late, other, prompt(300)):
        scheduler.add(each)
    assert counts(scheduler)[2] in (19, 20), "0.9 * 30 ms less a step of 7 ms"
    now += 0.027
    assert counts(scheduler)[2] in (37, 38), "47 of 100 ms are gone: there is room for a whole step"
    now += 0.140
    assert counts(scheduler) == [1, 1, LEAST_CHUNK], "187 of 150 ms"


def test_nobody_waits_for_whoever_can_not_be_in_time_any_more() -> None:
    """Two tokens, one gap: once it is over, shorter steps are no help."""
    now = 50.0
    scheduler = DecodeScheduler(512, lambda: COST, clock=lambda: now)
    lost = resident(5)
    lost.tpot_s, lost.first_token_at, lost.rule = 0.050, now - 0.046, replace(NEVER_STOP, max_tokens=2)
    scheduler.add(lost)
    scheduler.add(prompt(300))
    assert counts(scheduler)[1] in (38, 39), "4 of 50 ms are left for a step of 6: it is as if it had just come"
    behind = resident(5)
    behind.tpot_s, behind.first_token_at, behind.rule = 0.050, now - 0.090, replace(NEVER_STOP, max_tokens=4)
    scheduler.add(behind)
    assert counts(scheduler)[2] == LEAST_CHUNK, "its three gaps may take 150 ms"


def test_who_is_on_the_way_with_few_tokens_finds_a_short_chunk() -> None:
    """A wait of 64 tokens' time is nothing over 100 gaps, and the end of an objective for one."""
    scheduler = DecodeScheduler(512, lambda: COST, clock=still)
    long = prompt(600)
    long.tpot_s = 0.080
    scheduler.add(long)
    assert counts(scheduler)[0] in (69, 70), "no resident"
    scheduler.expected = (Expected(100, 0.040),)
    assert counts(scheduler)[0] in (69, 70)
    scheduler.expected = (Expected(100, 0.040), Expected(1, 0.040))
    assert counts(scheduler)[0] in (18, 19), "36 ms less 10 for its step, 5 for the handoff and 2 that a chunk costs"
    scheduler.handoff_s = 0.010
    assert counts(scheduler)[0] in (13, 14), "handoffs were seen to take 5 ms longer"
    scheduler.handoff_s = 0.005
    scheduler.expected = (Expected(1, 0.020),)
    assert counts(scheduler) == [LEAST_CHUNK]
    scheduler.expected = (Expected(1, 0.010),)
    assert counts(scheduler)[0] in (69, 70), "it can't be in time: no prompt has to wait for that"


def test_a_late_prompt_is_computed_in_short_steps() -> None:
    scheduler = DecodeScheduler(512, lambda: replace(COST, chunk=0.005), clock=still)
    late = prompt(600)
    late.late = True
    scheduler.add(late)
    assert counts(scheduler) == [LATE_CHUNK]
    costly = DecodeScheduler(512, lambda: replace(COST, chunk=0.020), clock=still)
    costly.add(late)
    assert counts(costly) == [80], "a fifth of such a step is the 20 ms that a chunk costs anyway"


def test_a_prompt_goes_on_however_tight_the_objectives() -> None:
    scheduler = DecodeScheduler(512, lambda: COST, clock=still)
    strict = resident(5)
    strict.tpot_s = 0.0061
    scheduler.add(strict)
    scheduler.add(prompt(100))
    assert counts(scheduler) == [1, LEAST_CHUNK]


def test_nobody_waits_for_an_objective_that_no_step_could_keep() -> None:
    """A millisecond, where a step takes six: prompts go on as beside a resident without an objective."""
    scheduler = DecodeScheduler(512, lambda: COST, clock=still)
    impossible, kept = resident(5), resident(5)
    impossible.tpot_s, impossible.rule = 0.001, replace(NEVER_STOP, max_tokens=20)
    scheduler.add(impossible)
    scheduler.add(prompt(100))
    assert counts(scheduler)[1] == 12, "three steps of 6 ms less one"
    kept.tpot_s = 0.050
    scheduler.add(kept)
    assert counts(scheduler)[2] in (37, 38), "the other one's objective holds"


@pytest.mark.parametrize("per_pair", [COST.per_pair, 0.0, 1e-9])
def test_an_objective_without_end_is_no_limit(per_pair: float) -> None:
    """The greatest number that fits the wire's field, in case a caller does not check."""
    scheduler = DecodeScheduler(512, lambda: replace(COST, per_pair=per_pair), clock=still)
    scheduler.expected = (Expected(1_000_000, sys.float_info.max),)
    loose = resident(5)
    loose.tpot_s = sys.float_info.max
    scheduler.add(loose)
    scheduler.add(prompt(600))
    assert counts(scheduler) == [1, 512]


def test_a_fixed_budget_bounds_what_objectives_allow() -> None:
    scheduler = DecodeScheduler(512, lambda: COST, 0.030, clock=still)
    scheduler.add(resident(5))
    scheduler.add(prompt(100))
    assert counts(scheduler)[1] in (20, 21)


def test_without_objectives_a_step_is_stretched_by_a_factor() -> None:
    scheduler = DecodeScheduler(512, lambda: StepCost(0.0, 0.001, 0.0, 0.019, 0.001, 0.0), clock=still)
    scheduler.add(resident(5))
    scheduler.add(prompt(100))
    assert counts(scheduler)[1] in (39, 40)


def test_prompts_go_by_rank_and_share_the_chunk() -> None:
    scheduler = DecodeScheduler(32, lambda: COST, clock=still)
    long, urgent = prompt(100, 2.0), prompt(5, 1.0)
    scheduler.add(long)
    scheduler.add(urgent)
    assert counts(scheduler) == [5, 3]  # 8 tokens are four times the fixed cost
