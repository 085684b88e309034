"""The highest rate at which 90 % of requests keep their objectives: `make bench-goodput CORNER=tpot|ttft|middle`.

Every mode of `modes.py` gets the same requests at the same fixed rates, round by round: all clusters are up and take
turns at a window of load, in rotating order. Objectives are multiples of the idle system's times, measured in the same
run before any load. The colocated mode gets the best of several TPOT budgets, tried before the rounds at the middle
rate.

A prompt longer than the TTFT objective allows misses it on an idle system too, in every mode: 14 % of the conversation
trace with twice the idle TTFT of the median, and more or less of any one minute. So 90 % of the other requests must
keep their objectives, window by window. The idle TTFTs of the median prompt and of longer ones tell them apart.

The client shares a core with the clusters. At the lowest rate at which it was late in any mode's window, and above, no
mode has a result: the window would measure the client.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import uvloop

from baton.bench.measuring import measure_on
from baton.bench.schedule.config import LoadConfig
from baton.bench.schedule.plan import LoadPlan, Planned, make_plan
from baton.bench.sending.driver import LoadTarget, connect, run_plan
from benchmarks.report import Row, publish, spread
from benchmarks.serving.idle import Idle, idle_times
from benchmarks.serving.modes import ADAPTIVE, DISAGGREGATED, Mode, colocated, together

CORNERS = {"tpot": (12.0, 1.5), "ttft": (2.0, 6.0), "middle": (4.9, 3.0)}
"""Multiples of the idle TTFT and of the idle step; the middle is the geometric mean of tight and relaxed."""
WANTED = 0.9
BURSTINESS = 4.0
SCALE = 1 / 8
CONTEXT = 8192
AGAINST = ("disaggregated", "colocated")
BUDGETS = (0.0, 0.8, 0.65)
"""Bounds on the colocated mode's steps, in TPOT objectives; 0: the objective alone, as in the other modes."""
WARM_UP, WARM_EVERY_S, WARM_SEED = 3, 0.4, 7_000_000
"""Prompts before each window, for a cluster that was idle during the others' windows."""
LEAST = {"tpot": 1.6, "ttft": 0.95, "middle": 0.95}
"""The adaptive mode's target in multiples of the colocated mode; in the middle, of the better fixed mode."""


@dataclass(frozen=True, slots=True)
class Workload:
    """Prompt and output lengths, as for `baton bench`, and the median and the longest prompt, all scaled."""

    prompt_tokens: str
    output_tokens: str
    median_prompt: int
    longest_prompt: int

    def idle_prompts(self, corner: str) -> tuple[int, ...]:
        """The median prompt; the longest within the corner's TTFT objective if TTFT were linear in tokens; twice
        that."""
        within = int(CORNERS[corner][0] * self.median_prompt)
        twice = (2 * within,) if 2 * within <= self.longest_prompt else ()
        return self.median_prompt, min(within, self.longest_prompt), *twice


# Lognormals with the mean and the standard deviation of the logarithms of the trace's lengths (the maximum likelihood
# fit), cut at the trace's longest. Of 19,366 conversation requests: exp(6.633), 0.985, 14,050 for prompts, and
# exp(5.019), 0.859, 1,000 for outputs. Of 8,819 code requests: exp(6.999), 1.360, 7,437, and exp(2.788), 0.847, 1,899.
# Medians and longest are divided by 8 here. The traces' own median prompts are 1,020 and 1,469 tokens.
WORKLOADS = {
    "conv": Workload("lognormal:95:0.985:1756", "lognormal:18.9:0.859:125", 127, 1756),
    "code": Workload("lognormal:136.9:1.36:930", "lognormal:2.03:0.847:237", 184, 930),
}


def load_of(workload: Workload, trace: Path | None, corner: str, idle: Idle, seconds: float) -> LoadConfig:
    """The load without rate and seed."""
    slack_ttft, slack_tpot = CORNERS[corner]
    return LoadConfig(
        arrivals="steady",
        burstiness=BURSTINESS,
        seconds=seconds,
        trace=trace,
        length_scale=SCALE if trace else 1.0,
        prompt_tokens=workload.prompt_tokens,
        output_tokens=workload.output_tokens,
        slo=f"ttft_ms={idle.ttft * slack_ttft:.3f},tpot_ms={idle.step * slack_tpot:.3f}",
    )


@dataclass(frozen=True, slots=True)
class Goodput:
    """Requests per second at the wanted attainment. `bound` is "at least" or "at most" if the tried rates do not
    enclose it, else empty."""

    rate: float
    bound: str = ""

    def reaches(self, factor: float, other: Goodput) -> bool | None:
        """Whether it is at least `factor` times the other; None if the bounds leave that open."""
        enough = self.rate >= factor * other.rate
        if enough:
            return None if self.bound == "at most" or other.bound == "at least" else True
        return None if self.bound == "at least" or other.bound == "at most" else False


def rate_at(attained: Mapping[float, float], wanted: float = WANTED) -> Goodput:
    """The rate at which the attainment crosses the wanted one, interpolated between the first rate that misses it and
    the rate below."""
    rates = sorted(attained)
    missed = next((index for index, rate in enumerate(rates) if attained[rate] < wanted), None)
    if missed is None:
        return Goodput(rates[-1], "at least")
    if missed == 0:
        return Goodput(rates[0], "at most")
    below, above = rates[missed - 1], rates[missed]
    kept, share = attained[below], attained[above]
    return Goodput(below + (above - below) * (kept - wanted) / (kept - share))


def attainable(load: LoadConfig, corner: str, idle: Idle) -> float:
    """The share of requests whose prompt alone is within the TTFT objective."""
    requests, longest = make_plan(load, CONTEXT).requests, idle.longest_within(CORNERS[corner][0] * idle.ttft)
    return sum(request.prompt_tokens <= longest for request in requests) / len(requests)


@dataclass(frozen=True, slots=True)
class Loads:
    """The windows of a corner."""

    corner: str
    idle: Idle
    load: LoadConfig
    warming: Iterator[int] = field(default_factory=lambda: itertools.count(WARM_SEED))

    async def window(self, name: str, target: LoadTarget, rate: float, seed: int, part: int = 0) -> float | None:
        """The share kept of the requests whose objectives an idle system can keep; None if the client was the
        bottleneck. Each seed and part has its own prompts."""
        load = replace(self.load, rate=rate, seed=seed)
        warm = [Planned(index, index * WARM_EVERY_S, 64, 8) for index in range(WARM_UP)]
        await run_plan(target, LoadPlan(tuple(warm), WARM_UP * WARM_EVERY_S), LoadConfig(seed=next(self.warming)))
        measured, _ = await measure_on(target, load, part=part)
        kept, possible = measured.summary.attainment, attainable(load, self.corner, self.idle)
        told = f"{kept:.1%} of {measured.summary.requests} kept, {possible:.1%} can be"
        print(f"{name}, {rate:g}/s: {'; '.join((told, *measured.verdict.warnings))}", flush=True)
        return kept / possible if measured.verdict.valid else None


async def best_colocated(loads: Loads, rate: float, tpot_ms: float) -> tuple[Mode, float]:
    """The colocated mode with the TPOT budget that keeps the most, and that budget in TPOT objectives."""
    kept: dict[float, float] = {}
    for share in BUDGETS:
        print(f"a TPOT budget of {share:g} x the objective:", flush=True)
        async with colocated(share * tpot_ms).start() as address, connect(address, loads.load) as target:
            window = await loads.window("colocated", target, rate, 1000)
        if window is None:
            raise RuntimeError(f"{rate:g}/s is more than this client sends in time; name lower rates")
        kept[share] = window
    best = max(kept, key=lambda share: kept[share])
    return colocated(best * tpot_ms), best


async def measure(loads: Loads, rates: Sequence[float], rounds: int, modes: Sequence[Mode]) -> list[Row]:
    """A row per mode, and one per mode and rate."""
    found: dict[tuple[str, float], list[float | None]] = {(mode.name, rate): [] for mode in modes for rate in rates}
    async with together(modes) as addresses, contextlib.AsyncExitStack() as stack:
        targets = {
            name: await stack.enter_async_context(connect(address, loads.load)) for name, address in addresses.items()
        }
        bound = math.inf  # the lowest rate that the client could not send
        for round_, (part, rate) in itertools.product(range(rounds), enumerate(rates)):
            first = (round_ + part) % len(modes)
            for mode in (*modes[first:], *modes[:first]):
                if rate >= bound:
                    break  # without a result anyway
                share = await loads.window(mode.name, targets[mode.name], rate, round_, part)
                found[mode.name, rate].append(share)
                if share is None:
                    bound = rate
    return rows_of(loads.corner, found)


def rows_of(corner: str, windows: Mapping[tuple[str, float], Sequence[float | None]]) -> list[Row]:
    """Rows from the share that each mode kept at each rate, window by window; None: the client was the bottleneck."""
    found = measurable(windows)
    names, rates = list(dict.fromkeys(name for name, _ in found)), list(dict.fromkeys(rate for _, rate in found))
    goodput = {name: rate_at({rate: statistics.median(found[name, rate]) for rate in rates}) for name in names}
    detail = [
        Row(f"{name}: kept at {rate:g}/s, of what is attainable", "%", statistics.median(shares) * 100, "", None, True,
            spread=spread([share * 100 for share in shares]))
        for (name, rate), shares in found.items()
    ]  # fmt: skip
    return [row_of(corner, name, goodput) for name in names] + compared(found, rates) + detail


def measurable(windows: Mapping[tuple[str, float], Sequence[float | None]]) -> dict[tuple[str, float], list[float]]:
    """The windows below the lowest rate at which the client was late in any mode. Raises RuntimeError without any."""
    bound = min((rate for (_, rate), shares in windows.items() if None in shares), default=math.inf)
    left = {key: [share for share in shares if share is not None] for key, shares in windows.items() if key[1] < bound}
    if not left:
        raise RuntimeError(f"{bound:g}/s is more than this client sends in time; name lower rates")
    if bound < math.inf:
        print(f"left out, because the client could not send it in time: {bound:g}/s and above", flush=True)
    return left


def compared(found: Mapping[tuple[str, float], Sequence[float]], rates: Sequence[float]) -> list[Row]:
    """The adaptive mode against each other mode, window by window: the same requests, minutes apart. A single window
    has no standard error and no row."""
    rows: list[Row] = []
    for other in dict.fromkeys(name for name, _ in found if name != ADAPTIVE.name):
        pairs = [pair for rate in rates for pair in zip(found[ADAPTIVE.name, rate], found[other, rate], strict=True)]
        less = [(ours - theirs) * 100 for ours, theirs in pairs]
        if len(less) < 2:
            continue
        error = statistics.stdev(less) / math.sqrt(len(less))
        case = f"adaptive less {other}, mean of {len(less)} windows, standard error {error:.1f}"
        rows.append(Row(case, "%", statistics.fmean(less), "", None, True, spread=spread(less)))
    return rows


def row_of(corner: str, mode: str, goodput: Mapping[str, Goodput]) -> Row:
    """A mode against the colocated one, in the middle against the best other; only the adaptive mode has a target."""
    ours = goodput[mode]
    others = [name for name in goodput if name != mode and (corner == "middle" or name == "colocated")]
    best = max(others, key=lambda name: goodput[name].rate, default=None)
    theirs = None if best is None else goodput[best]
    target, met = "", None
    if mode == "adaptive" and theirs is not None:
        target, met = f"at least {LEAST[corner]} x", ours.reaches(LEAST[corner], theirs)
    return Row(
        f"{corner}: goodput at 90 % of what is attainable, {mode}" + (f", {ours.bound}" if ours.bound else ""),
        "requests/s",
        ours.rate,
        " ".join(filter(None, (best, theirs.bound))) if best and theirs else "",
        None if theirs is None else theirs.rate,
        True,
        target,
        met,
    )


async def run(options: argparse.Namespace) -> list[Row]:
    """Measures idle times, then the load."""
    workload = WORKLOADS[options.workload]
    idle = await idle_times(DISAGGREGATED, workload.idle_prompts(options.corner))
    load = load_of(workload, options.trace, options.corner, idle, options.seconds)
    loads = Loads(options.corner, idle, load)
    possible = attainable(replace(load, rate=max(options.rates)), options.corner, idle)
    print(
        f"idle: TTFT {', '.join(f'{ms:.1f} ms of {tokens} tokens' for tokens, ms in idle.ttfts.items())}, step of 8 "
        f"{idle.step:.2f} ms; {load.slo}; {possible:.1%} are attainable",
        flush=True,
    )
    reference = [
        *(Row(f"idle TTFT of {tokens} tokens", "ms", ms, "", None, False) for tokens, ms in idle.ttfts.items()),
        Row("idle step of 8 sequences", "ms", idle.step, "", None, False),
        Row("attainable by an idle system, at the highest rate", "%", possible * 100, "", None, True),
    ]
    middle = sorted(options.rates)[len(options.rates) // 2]
    other, budget = await best_colocated(loads, middle, idle.step * CORNERS[options.corner][1])
    reference.append(Row("colocated: TPOT budget, of the objective (0: none)", "ratio", budget, "", None, True))
    modes = [mode for mode in (DISAGGREGATED, ADAPTIVE, other) if mode.name in (ADAPTIVE.name, *options.against)]
    return await measure(loads, options.rates, options.rounds, modes) + reference


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corner", choices=CORNERS, default="tpot")
    parser.add_argument("--workload", choices=WORKLOADS, default="conv")
    parser.add_argument(
        "--trace", type=Path, help="Azure's CSV of that workload; without it lengths are drawn from a fit"
    )
    parser.add_argument("--rates", type=lambda text: [float(rate) for rate in text.split(",")], default="1,2,3,4,5,6")
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--against", nargs="+", choices=AGAINST, default=AGAINST, help="the other modes to run")
    options = parser.parse_args()
    sys.exit(0 if publish(f"goodput-{options.corner}-{options.workload}", uvloop.run(run(options))) else 1)


if __name__ == "__main__":
    main()
