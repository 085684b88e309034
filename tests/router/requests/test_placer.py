"""Few workers are looked at first, and many where these will not do."""

from __future__ import annotations

import asyncio
import os
from dataclasses import replace
from typing import cast

import pytest

from baton.config import PathChoice, RoleName
from baton.cost import StepCost
from baton.errors import ResourceExhausted
from baton.spec import Objectives, ProcessRef, Sampling, SequenceSpec
from baton.telemetry import Counts
from baton.v1 import worker_pb2 as wire
from router.placement.snapshot import Demand, Queued
from router.requests.attempt import Attempt
from router.requests.order import Order
from router.requests.placer import FIRST_LOOK, PROBE_S, SECOND_LOOK, Placer
from router.text.detokenisation import OutputText
from router.workers.link import WorkerLink
from router.workers.registry import ServedModel
from router.workers.worker import Layout, ModelCard, Registration, Worker

ROUTER = ProcessRef("router", "r-1", "")
CARD = ModelCard("m", "f" * 32, 4096, 1000, frozenset(), "", "", Layout(1, 16, 2, 1, 4, "float32", 0, 1))
COST = StepCost(chunk=0.001, per_token=0.001, step=0.005, per_sequence=0.001)
COUNT = 4 * FIRST_LOOK

pytestmark = pytest.mark.asyncio


def worker(role: RoleName, index: int, blocks: int = 64) -> Worker:
    process = ProcessRef(f"{role}-{index:02}", os.urandom(4).hex(), "")
    link = WorkerLink(process, ROUTER, on_frame=lambda _: None, on_state=lambda: None, on_lost=lambda _: None)
    link.attached = True
    made = Worker(Registration(process, frozenset({role}), CARD, blocks, 8, ()), link, 0.0, language_ready=True)
    made.cost = COST
    return made


def model(*workers: Worker) -> ServedModel:
    return ServedModel(CARD, workers=list(workers))


def busy(at: Worker, seconds: float, rank: float) -> None:
    at.prefill.place(os.urandom(16), round(seconds * 1000), Queued(rank, seconds))


def order(ttft_ms: float | None, refuses: bool = True, tokens: int = 100) -> Order:
    prompt = tuple(range(tokens))
    spec = SequenceSpec(bytes(16), "r", prompt, Sampling(), 8, ROUTER, objectives=Objectives(ttft_ms=ttft_ms))
    now = asyncio.get_running_loop().time()
    return Order(spec, cast(OutputText, None), Demand(8, tokens), now, now + 60, 10.0, refuses)


async def test_the_least_busy_are_looked_at_and_the_rest_is_counted() -> None:
    prefills = [worker("prefill", index) for index in range(COUNT)]
    for index, each in enumerate(prefills):
        busy(each, 10.0 - index * 0.1, 0.0)
    decodes = [worker("decode", index) for index in range(COUNT)]
    placer = Placer("disaggregated", Counts())
    chosen, found = placer.place(order(None), model(*prefills, *decodes), {})
    assert chosen is prefills[-1]
    assert [candidate.name for candidate in found.candidates] == [
        each.name for each in prefills[: -FIRST_LOOK - 1 : -1]
    ]
    (told,) = placer.explanations.find("", "r")
    assert len(told.candidates) + told.others == COUNT, "decode workers compute no prompts on this path"


async def test_nobody_is_refused_before_the_others_were_asked() -> None:
    """Most has to be done where none of it is urgent: an urgent prompt goes first there."""
    prefills = [worker("prefill", index) for index in range(COUNT)]
    for each in prefills[:-1]:
        busy(each, 5.0, rank=-1e9)
    busy(prefills[-1], 50.0, rank=1e9)
    chosen, found = Placer("disaggregated", Counts()).place(order(500.0), model(*prefills, worker("decode", 0)), {})
    assert chosen is prefills[-1]
    assert found.meets
    assert len(found.candidates) == COUNT <= SECOND_LOOK
    with pytest.raises(ResourceExhausted):
        Placer("disaggregated", Counts()).place(order(50.0), model(*prefills, worker("decode", 0)), {})


async def test_a_cached_prefix_counts_among_equals() -> None:
    prefills = [worker("prefill", index) for index in range(COUNT)]
    for each in prefills:
        busy(each, 1.0, 0.0)
    holder = prefills[COUNT // 2]
    chosen, _ = Placer("disaggregated", Counts()).place(
        order(None), model(*prefills, worker("decode", 0)), {holder: 64}
    )
    assert chosen is holder


async def test_small_pools_take_nobodys_place_among_the_first() -> None:
    small = [worker("prefill", index, blocks=1) for index in range(FIRST_LOOK)]
    large = worker("prefill", 99)
    busy(large, 1.0, 0.0)
    chosen, _ = Placer("disaggregated", Counts()).place(order(None), model(*small, large, worker("decode", 0)), {})
    assert chosen is large


async def test_a_decode_worker_with_room_is_found_behind_full_ones() -> None:
    decodes = [worker("decode", index) for index in range(COUNT)]
    for each in decodes[:-1]:
        each.decode.bind(os.urandom(16), Demand(60, 1))  # all blocks promised, few tokens known
    decodes[-1].decode.bind(os.urandom(16), Demand(4, 64))
    choice = Placer("disaggregated", Counts()).choose_decode(model(*decodes), order(None), {}, frozenset(), "")
    assert choice is not None
    assert choice.has_room
    assert choice.worker is decodes[-1]


async def test_those_that_refused_are_left_out_before_the_look() -> None:
    decodes = [worker("decode", index) for index in range(COUNT)]
    refused = {each.process.incarnation for each in decodes[:-2]}
    placer = Placer("disaggregated", Counts())
    choice = placer.choose_decode(model(*decodes), order(None), {}, refused, decodes[-2].name)
    assert choice is not None
    assert choice.worker is decodes[-1]
    only = placer.choose_decode(model(*decodes[:-1]), order(None), {}, refused, decodes[-2].name)
    assert only is not None
    assert only.worker is decodes[-2], "the one to avoid, where there is no other"
    assert placer.choose_decode(model(*decodes[:-2]), order(None), {}, refused, "") is None


@pytest.mark.parametrize("path", ["adaptive", "disaggregated"])
async def test_the_decode_worker_that_can_hold_it_is_found_behind_many_small_ones(path: PathChoice) -> None:
    small = [worker("decode", index, blocks=4) for index in range(SECOND_LOOK)]
    large = worker("decode", 99)
    large.decode.bind(os.urandom(16), Demand(10, 160))
    prefill, placer = worker("prefill", 0), Placer(path, Counts())
    placer.place(order(None), model(prefill, *small, large), {})
    choice = placer.choose_decode(model(prefill, *small, large), order(None), {}, frozenset(), "")
    assert choice is not None
    assert choice.worker is large
    with pytest.raises(ResourceExhausted, match="no decode worker's pool has 8 blocks") as caught:
        placer.place(order(None), model(prefill, *small), {})
    assert (caught.value.constraint, caught.value.retry_after_s) == ("decode_blocks", None)
    with pytest.raises(ResourceExhausted, match="no prefill worker's pool has 7 blocks"):
        Placer("disaggregated", Counts()).place(order(None), model(worker("prefill", 1, blocks=6), large), {})


async def test_what_is_on_the_way_for_one_model_does_not_count_for_another() -> None:
    placer, pair = Placer("adaptive", Counts()), model(worker("prefill", 0), worker("decode", 0))
    other = ServedModel(replace(CARD, name="other"))
    attempts = [os.urandom(16) for _ in range(3)]
    for attempt in attempts:
        placer.placed(other, attempt, 500)
    assert placer._ask(order(None), 0.0, pair.card.name, 2).unbound == 0
    placer.placed(pair, os.urandom(16), 100)
    asked = placer._ask(order(None), 0.0, pair.card.name, 4)
    assert (asked.unbound, asked.unbound_tokens) == (0.25, 25.0)
    for attempt in attempts * 2:
        placer.settled(attempt)
    assert placer.unbound == 1
    assert list(placer._on_the_way) == ["m"]


async def test_an_idle_worker_is_not_doubted_for_ever() -> None:
    """A slow minute taught that all takes three times as long: who wants to be refused would be, and nothing would
    ever show that the minute is over."""
    counts, prefill = Counts(), worker("prefill", 0)
    placer, there = Placer("disaggregated", counts), model(prefill, worker("decode", 0))
    for _ in range(64):
        prefill.accuracy.observe(0.1, 0.3)
    assert prefill.accuracy.factor > 2
    with pytest.raises(ResourceExhausted):
        placer.place(order(200.0), there, {})
    assert prefill.probed_at is not None, "from now on it may be"
    prefill.probed_at -= PROBE_S
    with pytest.raises(ResourceExhausted):
        placer.place(order(5.0), there, {})  # further off than any slow minute
    prefill.prefill.place(b"x" * 16, 10)
    with pytest.raises(ResourceExhausted):
        placer.place(order(200.0), there, {})  # it computes: that will teach it
    prefill.prefill.release(b"x" * 16, 0.0)
    chosen, found = placer.place(order(200.0), there, {})
    assert chosen is prefill
    assert not found.meets, "and the promise is what is believed"
    assert "let in to see" in found.reason
    assert counts.snapshot() == {"refused_ttft": 3, "probes": 1, "placed_missing_ttft": 1}
    _, again = placer.place(order(200.0), there, {})
    assert again.meets, "what was believed is forgotten"


async def test_what_was_learned_of_a_busy_worker_is_believed() -> None:
    """A first token came just now: the prediction is as good as it gets."""
    prefill = worker("prefill", 0)
    now = asyncio.get_running_loop().time()
    prefill.probed_at = now - 2 * PROBE_S
    prefill.accuracy.observe(0.1, 0.1, now=now - 1.0)
    with pytest.raises(ResourceExhausted):
        Placer("disaggregated", Counts()).place(order(60.0), model(prefill, worker("decode", 0)), {})


async def test_a_sequence_whose_objective_no_step_can_keep_is_in_nobodys_way() -> None:
    decode = worker("decode", 0)
    assert (decode.keepable(1.0), decode.keepable(0.001), decode.keepable(None)) == (1.0, None, None)
    attempt = Attempt(os.urandom(16), worker("prefill", 0))
    attempt.bind(decode, Demand(4, 60), 0.001)
    assert decode.decode.strictest_s is None


async def test_what_is_on_its_way_is_taken_off_once() -> None:
    """Half a pool was free here and counted as taken, as long as two prompts of a quarter each were computed."""
    decode = worker("decode", 0)
    attempts = [Attempt(os.urandom(16), worker("prefill", 0)) for _ in range(2)]
    for attempt in attempts:
        attempt.bind(decode, Demand(16, 60), None)
    decode.reported(wire.LoadReport(free_blocks=32, held_blocks=32, granted_blocks=32))
    assert decode.decode.free_blocks == 32
    attempts[0].resident()
    decode.reported(wire.LoadReport(free_blocks=32, held_blocks=32, granted_blocks=16))
    assert decode.decode.free_blocks == 32


async def test_a_placement_without_a_promise_is_counted() -> None:
    """Tokens decide where a worker has not told its costs; an operator should see that."""
    counts, silent = Counts(), worker("prefill", 0)
    silent.cost = None
    _, found = Placer("adaptive", counts).place(order(50.0), model(silent, worker("decode", 0)), {})
    assert (found.ttft_s, found.meets) == (None, True)
    assert counts.snapshot() == {"placed_unpredicted": 1}
