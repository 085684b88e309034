"""Which path and worker a request gets, by predicted times: pure functions of a snapshot."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.cost import HANDOFF_S, StepCost
from baton.worker.prompt_queue import AGEING_S
from router.placement import prediction
from router.placement.offers import Way
from router.placement.policy import HOPELESS_RETRY_S, Plan, pick_decode, plan
from router.placement.snapshot import Ask, DecodeLoad, Demand, PrefillLoad, Queued

# 1 ms per prompt token; a step of 10 ms and 1 ms per sequence.
COST = StepCost(0.002, 0.001, 0.0, 0.010, 0.001, 0.0)
NOW = 1000.0
P = PrefillLoad("p0", 0, 1000, COST, 512)
D = DecodeLoad("d0", 0, 0, 1000, 1000, 64, COST, 512)
TRIP = prediction.TRIP_S


def ask(tokens: int = 100, ttft: float | None = None, tpot: float | None = None, **more: object) -> Ask:
    made = Ask(NOW, tokens, Demand(tokens // 16 + 4, tokens), ttft, tpot)
    return made if not more else Ask(**{name: more.get(name, getattr(made, name)) for name in made._fields})  # type: ignore[arg-type]


def handed_over(worker: DecodeLoad, request: Ask) -> float:
    return prediction.handed_over(worker, request, prediction.step(worker, request))


def planned(request: Ask, *workers: PrefillLoad | DecodeLoad, direct: bool = True) -> Plan:
    prefills = [worker for worker in workers if isinstance(worker, PrefillLoad)]
    decodes = [worker for worker in workers if isinstance(worker, DecodeLoad)]
    found = plan(request, prefills, decodes, request.tokens // 16 + 1, direct)
    assert found is not None
    return found


def busy(seconds: float) -> tuple[Queued, ...]:
    """One prompt ahead, which must have started before ours."""
    return (Queued(NOW, seconds),)


def test_an_idle_cluster_takes_both_pools_and_promises_the_work() -> None:
    found = planned(ask(100, ttft=1.0, tpot=0.02), P, D)
    assert (found.chosen, found.way, found.meets) == ("p0", Way.PREFILL, True)
    assert found.ttft_s == pytest.approx(0.102 + TRIP)
    assert found.tpot_s == pytest.approx(0.011)


def test_the_shortest_backlog_is_taken_and_a_cached_prefix_counts() -> None:
    loaded = P._replace(queue=busy(0.5))
    cached = P._replace(name="p2", queue=busy(0.02), cached_tokens=96)
    assert planned(ask(), loaded, P._replace(name="p1"), D).chosen == "p1"
    assert planned(ask(), loaded, P._replace(name="p1"), cached, D).chosen == "p2"


def test_an_urgent_prompt_waits_for_the_chunk_under_way_and_no_more() -> None:
    computing = P._replace(queue=(Queued(NOW + 9.0, 3.0, None, 0.4),))
    assert planned(ask(100, ttft=1.0), computing, D, direct=False).ttft_s == pytest.approx(0.402 + 0.1 + TRIP)


def test_of_equals_the_one_chosen_longest_ago() -> None:
    early, late = P._replace(chosen_at=NOW - 2), P._replace(name="p1", chosen_at=NOW - 1)
    assert planned(ask(), early, late, D).chosen == "p0"
    assert planned(ask(), early._replace(chosen_at=NOW), late, D).chosen == "p1"
    assert planned(ask(), early, late._replace(cached_tokens=48), D).chosen == "p1"


def test_only_what_is_more_urgent_is_ahead() -> None:
    behind = P._replace(queue=(Queued(NOW + 9.0, 3.0, NOW + 9.0),))
    assert planned(ask(ttft=1.0), behind, D).ttft_s == pytest.approx(0.102 + TRIP)
    assert planned(ask(ttft=20.0), behind, D, direct=False).ttft_s == pytest.approx(3.102 + TRIP)


def test_who_cannot_be_in_time_is_behind_those_who_can() -> None:
    """A prompt of a second's work is due in half a second: it makes way, and a later one does not see it ahead."""
    hopeless = prediction.prefill(P, ask(1000, ttft=0.5)).queued
    assert (hopeless.rank, hopeless.due_at) == (NOW + 0.5 + AGEING_S, None)
    assert hopeless.chunk_s < 0.1, "it is computed in short steps"
    after = prediction.prefill(P._replace(queue=(hopeless,)), ask(100, ttft=1.0))
    assert after.raw_s == pytest.approx(hopeless.chunk_s + 0.102 + TRIP)
    close = prediction.prefill(P, ask(100, ttft=0.103)).queued
    assert (close.rank, close.due_at) == (NOW + 0.103, NOW + 0.103), "102 ms of work"


def test_in_place_where_only_that_keeps_the_first_token() -> None:
    residents = D._replace(sequences=4, tokens=400)
    found = planned(ask(200, ttft=0.6), P._replace(queue=busy(2.0)), residents)
    assert (found.way, found.meets) == (Way.DIRECT, True)
    assert "only so" in found.reason


def test_in_place_where_that_is_sooner_and_most_of_the_time_would_be_gone() -> None:
    residents = D._replace(sequences=4, tokens=400)
    assert planned(ask(200, ttft=1.0), P._replace(queue=busy(0.3)), residents).way is Way.PREFILL
    found = planned(ask(200, ttft=1.0), P._replace(queue=busy(0.5)), residents)
    assert (found.way, found.meets) == (Way.DIRECT, True)
    assert "little time" in found.reason
    later = residents._replace(queue=busy(0.6))
    assert planned(ask(200, ttft=1.0), P._replace(queue=busy(0.5)), later).way is Way.PREFILL


def test_a_prompt_in_place_is_predicted_with_the_chunks_that_it_will_get() -> None:
    """An idle worker cuts them by the prompt's own objective: 0.9 * 72 ms less 2 ms."""
    assert prediction.direct(D, ask(128)).raw_s == pytest.approx(0.002 + 0.128 + TRIP)
    assert prediction.direct(D, ask(126, tpot=0.0723)).raw_s == pytest.approx(2 * 0.002 + 0.126 + TRIP)


def test_in_place_never_where_a_resident_would_miss_its_objective() -> None:
    strict = D._replace(sequences=4, tokens=400, strictest_s=0.016)
    found = planned(ask(200, ttft=0.6), P._replace(queue=busy(2.0)), strict)
    assert (found.meets, found.constraint) == (False, "ttft")


def test_light_work_goes_in_place_when_that_is_twice_as_fast() -> None:
    queue, residents = P._replace(queue=busy(1.0)), D._replace(sequences=4, tokens=400)
    assert planned(ask(40), queue, residents).way is Way.DIRECT
    assert planned(ask(400), queue, residents).way is Way.PREFILL
    assert planned(ask(400), queue, residents._replace(cached_tokens=384)).way is Way.DIRECT
    assert planned(ask(400), queue, D).way is Way.DIRECT  # it has nobody to disturb
    assert planned(ask(400, unbound=1), queue, D).way is Way.PREFILL  # it is about to
    assert planned(ask(400, unbound=0.25), queue, D).way is Way.PREFILL  # or one of four such workers is
    assert planned(ask(40), queue, residents, direct=False).way is Way.PREFILL


def test_the_step_must_keep_this_objective_and_everybody_elses() -> None:
    full = D._replace(sequences=20, tokens=2000)
    found = planned(ask(tpot=0.025), P, full)
    assert (found.meets, found.constraint) == (False, "tpot")
    assert planned(ask(tpot=0.025), P, full, D._replace(name="d1")).meets
    others = planned(ask(tpot=1.0), P, D._replace(sequences=5, strictest_s=0.0155))
    assert (others.meets, others.constraint) == (False, "others")


def test_an_objective_that_is_lost_already_is_in_nobodys_way() -> None:
    """Steps of 15 ms and somebody who wants 1: he misses it with us and without us."""
    poisoned = D._replace(sequences=4, tokens=400, strictest_s=0.001)
    assert planned(ask(ttft=2.0, tpot=0.1), P, poisoned).meets
    assert planned(ask(40, ttft=2.0, tpot=0.1), P._replace(queue=busy(9.0)), poisoned).way is Way.DIRECT
    choice = pick_decode([poisoned, D._replace(name="full", sequences=8, tokens=9000)], Demand(4, 50), tpot_s=0.1)
    assert choice is not None
    assert (choice.chosen, choice.keeps) == ("d0", True)


def test_prompts_do_not_pile_up_in_place_where_nobody_keeps_all_objectives() -> None:
    """The step takes longer than is asked, in place by a little less than over both pools."""
    behind = D._replace(sequences=20, tokens=2000)
    request = ask(ttft=1.0, tpot=0.025, gaps=8)
    over_both, in_place = (handed_over(behind, request), prediction.step(behind, request))
    assert 0.025 < in_place < over_both < 1.25 * in_place
    found = planned(request, P, behind)
    assert (found.meets, found.constraint, found.way) == (False, "tpot", Way.PREFILL)
    found = planned(request, P._replace(queue=busy(3.0)), behind)
    assert (found.meets, found.way) == (False, Way.DIRECT), "over both pools would miss the first token by far"


def test_want_of_room_is_not_called_slowness() -> None:
    found = planned(ask(ttft=2.0), P, D._replace(sequences=2, free_blocks=1, mean_tokens=1000.0))
    assert (found.meets, found.constraint) == (False, "decode_room")
    assert found.retry_s == pytest.approx(1000 * 0.012 / 2 / 2), "when one of the two has ended, about"


def test_a_priority_does_not_change_when_a_prompt_is_due() -> None:
    """Due in 2 s, 0.8 s of work, and ahead of others by a second: ours of 0.6 s before it leaves it time enough."""
    urgent = prediction.prefill(P, ask(800, ttft=2.0, priority=1)).queued
    assert (urgent.rank, urgent.due_at) == (NOW + 1.0, NOW + 2.0)
    behind = P._replace(queue=(urgent._replace(chunk_s=0.0),))
    assert planned(ask(600, ttft=0.7), behind, D, direct=False).meets
    late = planned(ask(1300, ttft=1.4, priority=2), behind, D, direct=False)
    assert (late.meets, late.constraint) == (False, "others"), "1.3 and 0.8 s are more than 2"


def test_a_handoff_beside_prompts_is_made_good_by_smaller_chunks() -> None:
    """Steps of 0.9 * 50 ms, half of one until it is in; then 11 ms, until its mean is within the objective again."""
    computing = D._replace(queue=busy(2.0), sequences=0)
    one_gap = ask(200, tpot=0.05)._replace(gaps=1)
    assert handed_over(computing, one_gap) == pytest.approx(0.045)
    tight = ask(200, tpot=0.03)._replace(gaps=1)
    assert handed_over(computing, tight) == pytest.approx(0.011 + 0.0135 + HANDOFF_S)
    assert handed_over(computing, tight._replace(gaps=20)) == pytest.approx(0.027)


def test_what_is_admitted_but_not_bound_yet_counts() -> None:
    assert planned(ask(tpot=0.02), P, D).meets
    assert not planned(ask(tpot=0.02, unbound=12), P, D).meets


def test_nobody_placed_before_is_made_late() -> None:
    """The one in the queue can just wait 50 ms; ours takes 100."""
    tight = P._replace(queue=(Queued(NOW + 0.25, 0.2, NOW + 0.25),))
    found = planned(ask(ttft=0.15), tight, D._replace(sequences=1, strictest_s=0.0121))
    assert (found.meets, found.constraint) == (False, "others")


def test_a_refusal_says_when_to_come_back() -> None:
    found = planned(ask(100, ttft=0.2), P._replace(queue=busy(2.0)), D._replace(sequences=1, strictest_s=0.0121))
    assert found.constraint == "ttft"
    assert found.retry_s == pytest.approx(2.102 + TRIP - 0.2)
    drained = planned(ask(tpot=0.005), P, D._replace(sequences=2, mean_tokens=1000.0))
    assert drained.constraint == "tpot"
    assert drained.retry_s == HOPELESS_RETRY_S, "an idle step takes 11 ms: coming back is no use"
    slower = planned(ask(tpot=0.0115), P, D._replace(sequences=2, mean_tokens=1000.0))
    assert slower.retry_s == pytest.approx(1000 * 0.012 / 2 / 2)
    hopeless = planned(ask(4000, ttft=1.0), P, D)
    assert hopeless.retry_s == HOPELESS_RETRY_S, "four seconds of work, whoever is there"


def test_a_promise_is_more_than_the_prediction_where_those_were_broken() -> None:
    wary = P._replace(promise=1.5)
    found = planned(ask(100), wary, D)
    assert found.raw_ttft_s == pytest.approx(0.102 + TRIP)
    assert found.ttft_s == pytest.approx(1.5 * (0.102 + TRIP))


def test_what_a_handoff_adds_weighs_the_more_the_fewer_tokens_there_are() -> None:
    """A step takes 15 ms; the first gap of a sequence that comes in is half of one and the handoff longer."""
    residents = D._replace(sequences=4, tokens=400)
    many, few = ask(60, ttft=1.0, tpot=0.02, gaps=100), ask(60, ttft=1.0, tpot=0.02, gaps=1)
    assert planned(many, P, residents, direct=False).tpot_s == pytest.approx(0.015, rel=0.02)
    assert planned(many, P, residents).way is Way.PREFILL
    refused = planned(few, P, residents, direct=False)
    assert refused.tpot_s == pytest.approx(0.015 + 0.0075 + HANDOFF_S)
    assert (refused.meets, refused.constraint) == (False, "tpot")
    assert planned(few, P, residents).way is Way.DIRECT, "in place it comes with the next step"
    quick, slow = residents._replace(handoff_s=0.001), residents._replace(handoff_s=0.100)
    ten = ask(60, ttft=1.0, tpot=0.0239, gaps=10)
    assert planned(few._replace(tpot_s=0.0239), P, quick).way is Way.PREFILL, "where handoffs were seen to take less"
    assert (planned(ten, P, residents).way, planned(ten, P, slow).way) == (Way.PREFILL, Way.DIRECT)


def test_one_token_needs_no_step() -> None:
    found = planned(ask(tpot=0.001, gaps=0), P, D)
    assert (found.meets, found.tpot_s) == (True, None)


def test_without_any_cost_tokens_decide() -> None:
    found = planned(ask(), P._replace(cost=None, queued_tokens=50), P._replace(name="p1", cost=None), D)
    assert (found.chosen, found.ttft_s) == ("p1", None)


def test_decode_workers_that_keep_all_objectives_come_first() -> None:
    strict = D._replace(name="strict", sequences=4, strictest_s=0.0145)
    loose = D._replace(name="loose", sequences=8, tokens=9000)
    found = pick_decode([strict, loose], Demand(4, 50), tpot_s=0.1)
    assert found is not None
    assert found.chosen == "loose"


loads = st.tuples(st.lists(st.floats(0.01, 2), max_size=4), st.integers(0, 20), st.none() | st.floats(0.012, 0.1))


@given(
    st.lists(loads, min_size=1, max_size=4),
    st.integers(1, 2000),
    st.none() | st.floats(0.05, 5),
    st.none() | st.floats(0.005, 0.2),
)
def test_a_plan_that_meets_keeps_every_objective_it_predicts(
    workers: list[tuple[list[float], int, float | None]], tokens: int, ttft: float | None, tpot: float | None
) -> None:
    prefills = [
        P._replace(name=f"p{index}", queue=tuple(Queued(NOW + s, s, NOW + s) for s in sorted(queue)))
        for index, (queue, _, _) in enumerate(workers)
    ]
    decodes = [
        D._replace(name=f"d{index}", sequences=sequences, tokens=100 * sequences, strictest_s=strictest)
        for index, (_, sequences, strictest) in enumerate(workers)
    ]
    found = planned(ask(tokens, ttft, tpot), *prefills, *decodes)
    assert {candidate.name[0] for candidate in found.candidates} == {"p", "d"}
    assert found.ttft_s is not None
    if found.meets:
        assert ttft is None or found.ttft_s <= ttft
        assert tpot is None or found.tpot_s is None or found.tpot_s <= tpot
    else:
        assert found.constraint in ("ttft", "tpot", "others")
        assert found.retry_s > 0
