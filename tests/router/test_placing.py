"""Few workers are looked at first, and many where these will not do."""

from __future__ import annotations

import asyncio
import os
from typing import cast

import pytest

from baton.config import RoleName
from baton.cost import StepCost
from baton.errors import ResourceExhausted
from baton.spec import Objectives, ProcessRef, Sampling, SequenceSpec
from router.detokenisation import OutputText
from router.order import Order
from router.placing import FIRST_LOOK, SECOND_LOOK, Placer
from router.registry import ServedModel
from router.snapshot import Demand, Queued
from router.worker import Layout, ModelCard, Registration, Worker
from router.worker_link import WorkerLink

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
    at.prefill.place(os.urandom(16), round(seconds * 1000), Queued(rank, seconds, due=False))


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
    placer = Placer("disaggregated")
    chosen, found = placer.place(order(None), model(*prefills, *decodes), {})
    assert chosen is prefills[-1]
    assert [candidate.name for candidate in found.candidates] == [
        each.name for each in prefills[: -FIRST_LOOK - 1 : -1]
    ]
    (told,) = placer.explanations.find("", "r")
    assert len(told.candidates) + told.others == 2 * COUNT


async def test_nobody_is_refused_before_the_others_were_asked() -> None:
    """Most has to be done where none of it is urgent: an urgent prompt goes first there."""
    prefills = [worker("prefill", index) for index in range(COUNT)]
    for each in prefills[:-1]:
        busy(each, 5.0, rank=-1e9)
    busy(prefills[-1], 50.0, rank=1e9)
    chosen, found = Placer("disaggregated").place(order(500.0), model(*prefills, worker("decode", 0)), {})
    assert chosen is prefills[-1]
    assert found.meets
    assert len(found.candidates) == COUNT <= SECOND_LOOK
    with pytest.raises(ResourceExhausted):
        Placer("disaggregated").place(order(50.0), model(*prefills, worker("decode", 0)), {})


async def test_a_cached_prefix_counts_among_equals() -> None:
    prefills = [worker("prefill", index) for index in range(COUNT)]
    for each in prefills:
        busy(each, 1.0, 0.0)
    holder = prefills[COUNT // 2]
    chosen, _ = Placer("disaggregated").place(order(None), model(*prefills, worker("decode", 0)), {holder: 64})
    assert chosen is holder


async def test_small_pools_take_nobodys_place_among_the_first() -> None:
    small = [worker("prefill", index, blocks=1) for index in range(FIRST_LOOK)]
    large = worker("prefill", 99)
    busy(large, 1.0, 0.0)
    chosen, _ = Placer("disaggregated").place(order(None), model(*small, large, worker("decode", 0)), {})
    assert chosen is large


async def test_a_decode_worker_with_room_is_found_behind_full_ones() -> None:
    decodes = [worker("decode", index) for index in range(COUNT)]
    for each in decodes[:-1]:
        each.decode.bind(os.urandom(16), Demand(60, 1))  # all blocks promised, few tokens known
    decodes[-1].decode.bind(os.urandom(16), Demand(4, 64))
    choice = Placer("disaggregated").choose_decode(model(*decodes), order(None), {}, frozenset(), "")
    assert choice is not None
    assert choice.has_room
    assert choice.worker is decodes[-1]


async def test_those_that_refused_are_left_out_before_the_look() -> None:
    decodes = [worker("decode", index) for index in range(COUNT)]
    refused = {each.process.incarnation for each in decodes[:-2]}
    placer = Placer("disaggregated")
    choice = placer.choose_decode(model(*decodes), order(None), {}, refused, decodes[-2].name)
    assert choice is not None
    assert choice.worker is decodes[-1]
    only = placer.choose_decode(model(*decodes[:-1]), order(None), {}, refused, decodes[-2].name)
    assert only is not None
    assert only.worker is decodes[-2], "the one to avoid, where there is no other"
    assert placer.choose_decode(model(*decodes[:-2]), order(None), {}, refused, "") is None
