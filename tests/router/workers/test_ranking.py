"""The order that is kept is the order that sorting would give."""

from __future__ import annotations

import os
import random

import pytest

from baton.config import RoleName
from router.placement.snapshot import Demand, Queued
from router.workers.served_model import Ranking
from router.workers.worker import Worker
from tests.router.requests.builders import worker

WORKERS, CHANGES = 20, 400


def carried(each: Worker, role: RoleName, saved: int) -> tuple[float, ...]:
    if role == "decode":
        return (each.decode.tokens - saved) / each.registration.blocks, each.chosen_at
    assert each.cost is not None
    return each.prefill.work_s - saved * each.cost.per_token, each.prefill.queued_tokens - saved, each.chosen_at


def change(chance: random.Random, each: Worker, role: RoleName, placed: list[bytes]) -> None:
    """Something is placed, ends, or is told by the worker."""
    what = chance.randrange(3)
    if what == 0 or not placed:
        placed.append(os.urandom(16))
        each.chosen_at = chance.random()
        if role == "decode":
            each.decode.bind(placed[-1], Demand(chance.randrange(1, 9), chance.randrange(100)))
        else:
            each.prefill.place(placed[-1], chance.randrange(100), Queued(chance.random(), chance.random()))
    elif what == 1:
        gone = placed.pop(chance.randrange(len(placed)))
        if role == "decode":
            each.decode.release(gone)
        else:
            each.prefill.release(gone, 0.0)
    elif role == "decode":
        each.decode.reported(chance.randrange(64), chance.randrange(200))
    else:
        each.prefill.reported(chance.randrange(200))


@pytest.mark.asyncio
@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_after_any_changes_the_least_are_those_that_sorting_finds(role: RoleName) -> None:
    chance = random.Random(role)
    workers = [worker(role, index, blocks=chance.choice([32, 64])) for index in range(WORKERS)]
    ranking, placed = Ranking(workers, role), {each: list[bytes]() for each in workers}
    for _ in range(CHANGES):
        for each in chance.sample(workers, chance.randrange(4)):
            change(chance, each, role, placed[each])
        cached = {each: 16 * chance.randrange(1, 4) for each in chance.sample(workers, chance.randrange(4))}
        allowed = set(chance.sample(workers, chance.randrange(1, WORKERS)))
        expected = sorted(
            allowed,
            key=lambda each: (*carried(each, role, cached.get(each, 0)), workers.index(each)),
        )
        found = ranking.least(3, cached, allowed.__contains__)
        assert found == expected[:3]
        assert ranking.least(WORKERS + 1, cached, allowed.__contains__) == expected


@pytest.mark.asyncio
async def test_one_process_may_be_ranked_for_both_roles() -> None:
    both = [worker("prefill", index) for index in range(2)]
    prefill, decode = Ranking(both, "prefill"), Ranking(both, "decode")
    both[0].prefill.place(os.urandom(16), 10, Queued(0.0, 1.0))
    both[1].decode.bind(os.urandom(16), Demand(1, 10))
    assert prefill.least(1, {}) == [both[1]]
    assert decode.least(1, {}) == [both[0]]


@pytest.mark.asyncio
async def test_a_later_ranking_takes_the_place_of_the_former() -> None:
    workers = [worker("decode", index) for index in range(3)]
    former = Ranking(workers[:2], "decode")
    later = Ranking(workers, "decode")
    for each in workers[:2]:
        each.decode.bind(os.urandom(16), Demand(1, 10))
    assert later.least(1, {}) == [workers[2]]
    assert len(former) == 2
    assert len(later) == 3
