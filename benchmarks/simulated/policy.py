"""The goodput of the three ways to serve, in simulated time: `make bench-policy`.

Judges changes of policy: `bench-goodput` takes an hour and is noisy. Has the same lengths, arrivals, corners and modes,
with a cost model (`replica.py`) and some thousand requests per rate. Does not cover the engine and the transports.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from baton.bench.schedule.config import LoadConfig
from baton.bench.schedule.plan import Planned, make_plan
from baton.config import PathChoice
from baton.cost import StepCost
from baton.engine.simulated import faster, read_costs
from benchmarks.report import Row, publish, spread
from benchmarks.serving.goodput import (
    BUDGETS,
    CONTEXT,
    CORNERS,
    WANTED,
    WORKLOADS,
    Goodput,
    Workload,
    attainable,
    load_of,
    rate_at,
    row_of,
)
from benchmarks.serving.idle import STEP_SEQUENCES, STEP_TOKENS, Idle
from benchmarks.simulated.replica import CHUNK, Machine, Replica
from router.placement.prediction import TRIP_S

PATHS: dict[str, PathChoice] = {"disaggregated": "disaggregated", "adaptive": "adaptive", "colocated": "direct"}
RATES = {"tpot": (5.0, 7.0, 8.0, 9.0, 10.0), "ttft": (1.5, 2.5, 3.5, 4.5), "middle": (2.0, 4.0, 5.0, 6.0)}


def idle_of(cost: StepCost, workload: Workload, corner: str) -> Idle:
    prompts = workload.idle_prompts(corner)
    held = STEP_TOKENS + STEP_TOKENS // 2  # a prompt, and half of an answer as long
    step = cost.decode(STEP_SEQUENCES, STEP_SEQUENCES * held)
    return Idle({tokens: (cost.prefill(tokens, 0, CHUNK) + TRIP_S) * 1e3 for tokens in prompts}, step * 1e3)


def share_kept(path: PathChoice, machine: Machine, requests: Sequence[Planned], budget_s: float | None = None) -> float:
    """The share of all requests that keep their objectives."""
    served = Replica(machine, path, budget_s).run(requests)
    return sum(each.kept for each in served) / len(served)


def shares(path: PathChoice, machine: Machine, load: LoadConfig, seeds: int, budget_s: float | None) -> list[float]:
    """The shares of a run per seed."""
    plans = [make_plan(replace(load, seed=seed), CONTEXT).requests for seed in range(seeds)]
    return [share_kept(path, machine, plan, budget_s) for plan in plans]


def budget_for(machine: Machine, load: LoadConfig, tpot_s: float, seeds: int) -> float | None:
    """The bound on colocated workers' steps that keeps the most objectives."""
    tried = [share * tpot_s or None for share in BUDGETS]
    return max(tried, key=lambda budget: sum(shares("direct", machine, load, seeds, budget)))


def corner_rows(corner: str, machine: Machine, options: argparse.Namespace) -> list[Row]:
    """A row per mode, and one per mode and rate."""
    workload, rates = WORKLOADS[options.workload], options.rates or RATES[corner]
    idle = idle_of(machine.cost, workload, corner)
    load = load_of(workload, options.trace, corner, idle, options.seconds)
    possible = attainable(replace(load, rate=max(rates)), corner, idle)
    middle = replace(load, rate=sorted(rates)[len(rates) // 2])
    budget_s = budget_for(machine, middle, idle.step * CORNERS[corner][1] / 1e3, options.seeds)
    goodput, detail = dict[str, Goodput](), list[Row]()
    for name, path in PATHS.items():
        found = {
            rate: shares(path, machine, replace(load, rate=rate), options.seeds, budget_s if path == "direct" else None)
            for rate in rates
        }
        means = {rate: sum(kept) / len(kept) for rate, kept in found.items()}
        goodput[name] = rate_at(means, WANTED * possible)
        detail += [
            Row(f"{corner}, {name}: attainment at {rate:g}/s", "%", means[rate] * 100, "", None, True,
                spread=spread([share * 100 for share in kept]))
            for rate, kept in found.items()
        ]  # fmt: skip
    return [*(row_of(corner, name, goodput) for name in PATHS), *detail]


def machine_of(options: argparse.Namespace) -> Machine:
    """`--speed` applies to router and client as to the workers."""
    machine = Machine(faster(read_costs(options.cost_model), options.speed), options.noise, options.contention)
    return replace(machine, frame_s=machine.frame_s / options.speed, token_s=machine.token_s / options.speed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corner", choices=CORNERS, help="only this one")
    parser.add_argument("--workload", choices=WORKLOADS, default="conv")
    parser.add_argument("--trace", type=Path, help="Azure's CSV of that workload; without it lengths are from a fit")
    parser.add_argument("--rates", type=lambda text: [float(rate) for rate in text.split(",")])
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--cost-model", default="smollm2-135m", help="as of `baton prefill --cost-model`")
    parser.add_argument("--speed", type=float, default=1.0, help="factor of the machine's speed")
    parser.add_argument("--noise", type=float, default=0.1, help="sigma of the logarithm of step times")
    parser.add_argument("--contention", type=float, default=1.1, help="of step times while the other core computes")
    options = parser.parse_args()
    machine = machine_of(options)
    corners = [options.corner] if options.corner else list(CORNERS)
    rows = [row for corner in corners for row in corner_rows(corner, machine, options)]
    sys.exit(0 if publish(f"policy-{options.workload}", rows) else 1)


if __name__ == "__main__":
    main()
