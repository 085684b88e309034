"""The policy as a whole, in simulated time: the same requests by each of the ways to serve, with no noise but the
model's own. What is compared here can't differ from run to run."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace

import pytest

from baton.bench.schedule.classes import TrafficClass
from baton.bench.schedule.config import LoadConfig
from baton.bench.schedule.plan import Planned, make_plan
from baton.engine.simulated import COSTS
from benchmarks.serving.goodput import CONTEXT, WORKLOADS, load_of
from benchmarks.simulated.policy import idle_of, shares
from benchmarks.simulated.replica import Machine, Replica

MACHINE = Machine(COSTS["smollm2-135m"])


def load(corner: str, rate: float, seconds: float) -> LoadConfig:
    workload = WORKLOADS["conv"]
    idle = idle_of(MACHINE.cost, workload, corner)
    return replace(load_of(workload, None, corner, idle, seconds), rate=rate)


def requests(corner: str, rate: float, seconds: float) -> Sequence[Planned]:
    return make_plan(load(corner, rate, seconds), CONTEXT).requests


@pytest.mark.parametrize(("corner", "rate"), [pytest.param("ttft", 3.0, marks=pytest.mark.nightly), ("middle", 5.0)])
def test_to_choose_for_each_request_is_as_good_as_the_better_of_the_fixed_ways(corner: str, rate: float) -> None:
    asked = load(corner, rate, 120.0)
    adaptive, split, direct = (
        statistics.fmean(shares(path, MACHINE, asked, 3, None)) for path in ("adaptive", "disaggregated", "direct")
    )
    assert adaptive >= max(split, direct)
    assert adaptive > min(split, direct) + 0.05, "and the fixed ways do differ here"


@pytest.mark.parametrize("rate", [6.0, pytest.param(8.0, marks=pytest.mark.nightly)])
def test_at_tight_tpot_the_decode_worker_helps_out(rate: float) -> None:
    """Also where it is behind: prompts don't pile up on it beside a prefill worker that rests."""
    adaptive, split, direct = (
        statistics.fmean(shares(path, MACHINE, load("tpot", rate, 120.0), 3, None))
        for path in ("adaptive", "disaggregated", "direct")
    )
    assert adaptive > max(split, direct) + 0.02


def test_all_end_and_nothing_stays_in_the_books() -> None:
    replica = Replica(MACHINE, "adaptive")
    served = replica.run(requests("middle", 8.0, 60.0))
    assert len(served) == 480
    assert all(each.tokens == each.planned.output_tokens for each in served)
    assert replica.placer.unbound == 0
    for worker in replica.workers:
        worker.seen.prefill.check_integrity()
        worker.seen.decode.check_integrity()
        assert (len(worker.seen.prefill), len(worker.seen.decode), worker.residents, worker.started) == (0, 0, {}, {})


def test_it_is_the_same_every_time_and_another_with_another_seed() -> None:
    plan = requests("middle", 5.0, 30.0)
    first, again, other = (
        [each.ttft_s for each in Replica(MACHINE, "adaptive", seed=seed).run(plan)] for seed in (1, 1, 2)
    )
    assert first == again != other


def test_an_idle_machine_takes_what_its_costs_say() -> None:
    """One request: its prompt's time and three hops; a step for each token after the first, and the handoff."""
    quiet = Machine(MACHINE.cost, noise=0.0, contention=1.0, frame_s=0.0, token_s=0.0)
    alone = Planned(0, 1.0, 100, 11, TrafficClass("all", ttft_ms=1e4, tpot_ms=1e4))
    (served,) = Replica(quiet, "disaggregated").run([alone])
    assert served.ttft_s == pytest.approx(quiet.cost.prefill(100, 0, 512) + 0.002, rel=1e-6)
    steps = sum(quiet.cost.decode(1, 100 + index) for index in range(1, 11))
    assert served.tpot_s == pytest.approx((steps + 0.0025) / 10, rel=1e-6)
