"""Whether the router keeps what it promises: `make bench-promises`.

Adaptive mode, one cluster for all runs of an engine, requests with when_unmet=refuse. First the capacity: the highest
rate at which 90 % of the requests keep their objectives, of those whose prompt an idle system computes in time. Then
80 % and 150 % of it, in bursts; promises and refusals by the client's clock.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

import uvloop

from baton.bench.figures.metrics import Summary
from baton.bench.measuring import measure_on
from baton.bench.schedule.config import LoadConfig
from baton.bench.sending.driver import LoadTarget, connect
from baton.bench.sweep import Point, best, next_rate
from benchmarks.report import Row, publish
from benchmarks.serving.goodput import WANTED, WORKLOADS, attainable, load_of
from benchmarks.serving.idle import idle_of
from benchmarks.serving.modes import Mode, adaptive, simulated

BELOW, ABOVE = 0.8, 1.5
"""Of the capacity."""
KEPT, MEDIAN, ATTAINED, ANSWER_MS, GOODPUT = 0.9, 1.25, 0.85, 20.0, 0.9
"""Targets: promises kept within 20 %; median promise over achieved; attainment of the admitted; 99th percentile of the
time to a refusal; goodput over its peak."""
RUNS = itertools.count()
TOLERANCE, POINTS = 0.15, 5
"""The precision of the capacity, and the most runs to find it."""


@dataclass(frozen=True, slots=True)
class Subject:
    """A mode, the first rate in the search of its capacity, and the seconds of each run."""

    mode: Mode
    rate: float
    seconds: float
    idle_s: float


SUBJECTS = {
    "simulated": Subject(Mode("simulated", simulated), 12.0, 12.0, 0.4),
    "model": Subject(Mode("model", adaptive), 2.0, 36.0, 0.6),
}


async def at_rate(target: LoadTarget, load: LoadConfig, rate: float) -> Summary:
    """One run, of fresh prompts: no cache has them. Raises RuntimeError if the client was the bottleneck."""
    found, _ = await measure_on(target, replace(load, rate=rate), part=next(RUNS))
    if not found.verdict.valid:
        raise RuntimeError(f"at {rate:g}/s: {found.verdict.warnings[0]}")
    summary, promise = found.summary, found.summary.ttft_promise
    told = (
        "no promises"
        if promise is None
        else f"{promise.kept_share:.1%} of promises kept, median promise {promise.promised_over_achieved_p50:.2f} x"
    )
    print(
        f"{rate:.2f}/s: {summary.attainment:.1%} kept, {summary.refusals.count} of {summary.requests} refused, {told}",
        flush=True,
    )
    return summary


async def capacity(target: LoadTarget, load: LoadConfig, start: float, wanted: float) -> tuple[float, list[Point]]:
    """The highest rate with the wanted attainment, and its runs. Raises RuntimeError without such a rate."""
    points: list[Point] = []
    while len(points) < POINTS and (rate := next_rate(points, start, wanted, TOLERANCE)) is not None:
        summary = await at_rate(target, load, rate)
        points.append(Point(rate, summary.attainment, summary.goodput))
    found = best(points, wanted)
    if found is None:
        raise RuntimeError(f"no rate down to {min(point.rate for point in points):g}/s keeps {wanted:.0%}")
    return found.rate, points


async def subject_rows(subject: Subject, scale: float) -> list[Row]:
    """All runs of one engine."""
    workload, name = WORKLOADS["conv"], subject.mode.name
    async with subject.mode.start() as address, connect(address, LoadConfig()) as target:
        idle = await idle_of(target, workload.idle_prompts("middle"), subject.idle_s)
        load = replace(load_of(workload, None, "middle", idle, subject.seconds * scale), when_unmet="refuse")
        print(f"{name}, idle: TTFT {idle.ttft:.1f} ms, step of 8 {idle.step:.2f} ms; {load.slo}", flush=True)
        possible = attainable(replace(load, rate=subject.rate), "middle", idle)
        rate, points = await capacity(target, load, subject.rate, WANTED * possible)
        longer = replace(load, seconds=2 * load.seconds, seed=1)
        below = await at_rate(target, longer, BELOW * rate)
        above = await at_rate(target, longer, ABOVE * rate)
    peak = max(*(point.goodput for point in points), below.goodput)
    return rows_of(name, rate, peak, below, above)


def rows_of(name: str, rate: float, peak: float, below: Summary, above: Summary) -> list[Row]:
    """The runs below and above the capacity, against the targets."""
    promise, answers = below.ttft_promise, above.refusals.answer_ms
    if promise is None or answers is None or above.attainment_admitted is None:
        raise RuntimeError(f"{name}: nothing was promised below the capacity, or nothing admitted or refused above it")
    kept, median = promise.kept_share, promise.promised_over_achieved_p50
    attained, goodput = above.attainment_admitted, above.goodput / peak
    under, over = f"{name}, {BELOW:.0%}", f"{name}, {ABOVE:.0%}"
    return [
        Row(f"{name}: capacity, {WANTED:.0%} of what is attainable", "requests/s", rate, "", None, True),
        Row(f"{under}: promised TTFT kept within 20 %", "%", kept * 100, "", None, True,
            f"at least {KEPT:.0%}", kept >= KEPT),
        Row(f"{under}: median promise over achieved", "ratio", median, "", None, False,
            f"at most {MEDIAN}", median <= MEDIAN),
        Row(f"{under}: attainment", "%", below.attainment * 100, "", None, True),
        Row(f"{over}: attainment of the admitted", "%", attained * 100, "", None, True,
            f"at least {ATTAINED:.0%}", attained >= ATTAINED),
        Row(f"{over}: refused", "%", above.refusals.count / above.requests * 100, "", None, False),
        Row(f"{over}: time to a refusal, p99", "ms", answers.p99, "", None, False,
            f"at most {ANSWER_MS:g} ms", answers.p99 <= ANSWER_MS),
        Row(f"{over}: goodput", "requests/s", above.goodput, "its peak", peak, True,
            f"at least {GOODPUT:g} x", goodput >= GOODPUT),
    ]  # fmt: skip


async def measure_all(names: Sequence[str], scale: float) -> list[Row]:
    """One engine after the other."""
    return [row for name in names for row in await subject_rows(SUBJECTS[name], scale)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engines", default="simulated,model", help="of simulated and model, with commas")
    parser.add_argument("--scale", type=float, default=1.0, help="factor of every run's length")
    options = parser.parse_args()
    rows = uvloop.run(measure_all(options.engines.split(","), options.scale))
    sys.exit(0 if publish("promises", rows) else 1)


if __name__ == "__main__":
    main()
