"""Few workers are looked at first, and many where these will not do."""

from __future__ import annotations

import asyncio
import os
from dataclasses import replace

import pytest

from baton.config import PathChoice
from baton.errors import ResourceExhausted
from baton.messages import LoadReport
from baton.telemetry import Counts
from router.placement.offers import Way
from router.placement.policy import Plan
from router.placement.snapshot import Demand
from router.requests.attempt import Attempt
from router.requests.commands import Commands
from router.requests.placer import FIRST_LOOK, PROBE_S, SECOND_LOOK
from router.workers.served_model import ServedModel
from router.workers.worker import Worker
from tests.router.requests.builders import CARD, busy, model, placer, request, worker

COUNT = 4 * FIRST_LOOK

pytestmark = pytest.mark.asyncio


def bound(decode: Worker, demand: Demand, tpot_ms: float | None = None) -> Attempt:
    """An attempt that is bound to this worker."""
    counts, prefill = Counts(), worker("prefill", 0)
    admitted = replace(request(None, model(prefill, decode), tpot_ms=tpot_ms), demand=demand)
    plan = Plan(prefill.name, Way.PREFILL, True, "", ())
    attempt = Attempt(admitted, prefill, plan, placer("disaggregated", counts), Commands(counts), counts)
    attempt.start()
    attempt.bind()
    assert attempt.decode is decode
    return attempt


async def test_the_least_busy_are_looked_at_and_the_rest_is_counted() -> None:
    prefills = [worker("prefill", index) for index in range(COUNT)]
    for index, each in enumerate(prefills):
        busy(each, 10.0 - index * 0.1, 0.0)
    decodes = [worker("decode", index) for index in range(COUNT)]
    placed = placer("disaggregated")
    chosen, found = placed.place(request(None, model(*prefills, *decodes)))
    assert chosen is prefills[-1]
    assert [candidate.name for candidate in found.candidates] == [
        each.name for each in prefills[: -FIRST_LOOK - 1 : -1]
    ]
    (told,) = placed.explanations.find("", "r")
    assert len(told.candidates) + told.others == COUNT, "decode workers compute no prompts on this path"


async def test_nobody_is_refused_before_the_others_were_asked() -> None:
    """Most has to be done where none of it is urgent: an urgent prompt goes first there."""
    prefills = [worker("prefill", index) for index in range(COUNT)]
    for each in prefills[:-1]:
        busy(each, 5.0, rank=-1e9)
    busy(prefills[-1], 50.0, rank=1e9)
    chosen, found = placer("disaggregated").place(request(500.0, model(*prefills, worker("decode", 0))))
    assert chosen is prefills[-1]
    assert found.meets
    assert len(found.candidates) == COUNT <= SECOND_LOOK
    with pytest.raises(ResourceExhausted):
        placer("disaggregated").place(request(50.0, model(*prefills, worker("decode", 0))))


async def test_a_cached_prefix_counts_among_equals() -> None:
    prefills = [worker("prefill", index) for index in range(COUNT)]
    for each in prefills:
        busy(each, 1.0, 0.0)
    holder = prefills[COUNT // 2]
    cached = placer("disaggregated", cached={holder: 64})
    chosen, _ = cached.place(request(None, model(*prefills, worker("decode", 0))))
    assert chosen is holder


async def test_small_pools_take_nobodys_place_among_the_first() -> None:
    small = [worker("prefill", index, blocks=1) for index in range(FIRST_LOOK)]
    large = worker("prefill", 99)
    busy(large, 1.0, 0.0)
    chosen, _ = placer("disaggregated").place(request(None, model(*small, large, worker("decode", 0))))
    assert chosen is large


async def test_a_decode_worker_with_room_is_found_behind_full_ones() -> None:
    decodes = [worker("decode", index) for index in range(COUNT)]
    for each in decodes[:-1]:
        each.decode.bind(os.urandom(16), Demand(60, 1))  # all blocks promised, few tokens known
    decodes[-1].decode.bind(os.urandom(16), Demand(4, 64))
    choice = placer("disaggregated").choose_decode(request(None, model(*decodes)), frozenset(), "")
    assert choice is not None
    assert choice[1]
    assert choice[0] is decodes[-1]


async def test_those_that_refused_are_left_out_before_the_look() -> None:
    decodes = [worker("decode", index) for index in range(COUNT)]
    refused = {each.process.incarnation for each in decodes[:-2]}
    placed = placer("disaggregated")
    choice = placed.choose_decode(request(None, model(*decodes)), refused, decodes[-2].name)
    assert choice is not None
    assert choice[0] is decodes[-1]
    only = placed.choose_decode(request(None, model(*decodes[:-1])), refused, decodes[-2].name)
    assert only is not None
    assert only[0] is decodes[-2], "the one to avoid, where there is no other"
    assert placed.choose_decode(request(None, model(*decodes[:-2])), refused, "") is None


@pytest.mark.parametrize("path", ["adaptive", "disaggregated"])
async def test_the_decode_worker_that_can_hold_it_is_found_behind_many_small_ones(path: PathChoice) -> None:
    small = [worker("decode", index, blocks=4) for index in range(SECOND_LOOK)]
    large = worker("decode", 99)
    large.decode.bind(os.urandom(16), Demand(10, 160))
    prefill, placed = worker("prefill", 0), placer(path)
    placed.place(request(None, model(prefill, *small, large)))
    choice = placed.choose_decode(request(None, model(prefill, *small, large)), frozenset(), "")
    assert choice is not None
    assert choice[0] is large
    with pytest.raises(ResourceExhausted, match="no decode worker's pool has 8 blocks") as caught:
        placed.place(request(None, model(prefill, *small)))
    assert (caught.value.constraint, caught.value.retry_after_s) == ("decode_blocks", None)
    with pytest.raises(ResourceExhausted, match="no prefill worker's pool has 7 blocks"):
        placer("disaggregated").place(request(None, model(worker("prefill", 1, blocks=6), large)))


async def test_what_is_on_the_way_for_one_model_does_not_count_for_another() -> None:
    placed, pair = placer("adaptive"), model(worker("prefill", 0), worker("decode", 0))
    other = ServedModel(replace(CARD, name="other"))
    attempts = [os.urandom(16) for _ in range(3)]
    for attempt in attempts:
        placed.placed(other, attempt, 500)
    assert placed._ask(request(None, pair), 0.0, 2).unbound == 0
    placed.placed(pair, os.urandom(16), 100)
    asked = placed._ask(request(None, pair), 0.0, 4)
    assert (asked.unbound, asked.unbound_tokens) == (0.25, 25.0)
    for attempt in attempts * 2:
        placed.settled(attempt)
    assert placed.unbound == 1
    assert list(placed._on_the_way) == ["m"]


async def test_an_idle_worker_is_not_doubted_for_ever() -> None:
    """A slow minute taught that all takes three times as long: who wants to be refused would be, and nothing would
    ever show that the minute is over."""
    counts, prefill = Counts(), worker("prefill", 0)
    placed, there = placer("disaggregated", counts), model(prefill, worker("decode", 0))
    for _ in range(64):
        prefill.accuracy.observe(0.1, 0.3)
    assert prefill.accuracy.factor > 2
    with pytest.raises(ResourceExhausted):
        placed.place(request(200.0, there))
    assert prefill.probed_at is not None, "from now on it may be"
    prefill.probed_at -= PROBE_S
    with pytest.raises(ResourceExhausted):
        placed.place(request(5.0, there))  # further off than any slow minute
    prefill.prefill.place(b"x" * 16, 10)
    with pytest.raises(ResourceExhausted):
        placed.place(request(200.0, there))  # it computes: that will teach it
    prefill.prefill.release(b"x" * 16, 0.0)
    chosen, found = placed.place(request(200.0, there))
    assert chosen is prefill
    assert not found.meets, "and the promise is what is believed"
    assert "let in to see" in found.reason
    assert counts.snapshot() == {"refused_ttft": 3, "probes": 1, "placed_missing_ttft": 1}
    _, again = placed.place(request(200.0, there))
    assert again.meets, "what was believed is forgotten"


async def test_what_was_learned_of_a_busy_worker_is_believed() -> None:
    """A first token came just now: the prediction is as good as it gets."""
    prefill = worker("prefill", 0)
    now = asyncio.get_running_loop().time()
    prefill.probed_at = now - 2 * PROBE_S
    prefill.accuracy.observe(0.1, 0.1, now=now - 1.0)
    with pytest.raises(ResourceExhausted):
        placer("disaggregated").place(request(60.0, model(prefill, worker("decode", 0))))


async def test_a_sequence_whose_objective_no_step_can_keep_is_in_nobodys_way() -> None:
    decode = worker("decode", 0)
    assert (decode.keepable(1.0), decode.keepable(0.001), decode.keepable(None)) == (1.0, None, None)
    bound(decode, Demand(4, 60), 1.0)
    assert decode.decode.strictest_s is None


async def test_what_is_on_its_way_is_taken_off_once() -> None:
    """Half a pool was free here and counted as taken, as long as two prompts of a quarter each were computed."""
    decode = worker("decode", 0)
    attempts = [bound(decode, Demand(16, 60)) for _ in range(2)]
    decode.reported(LoadReport(free_blocks=32, held_blocks=32, granted_blocks=32))
    assert decode.decode.free_blocks == 32
    assert attempts[0].started(attempts[0].prefill)
    attempts[0].decodes(None)
    decode.reported(LoadReport(free_blocks=32, held_blocks=32, granted_blocks=16))
    assert decode.decode.free_blocks == 32


async def test_a_placement_without_a_promise_is_counted() -> None:
    """Tokens decide where a worker has not told its costs; an operator should see that."""
    counts, silent = Counts(), worker("prefill", 0)
    silent.cost = None
    _, found = placer("adaptive", counts).place(request(50.0, model(silent, worker("decode", 0))))
    assert (found.ttft_s, found.meets) == (None, True)
    assert counts.snapshot() == {"placed_unpredicted": 1}
