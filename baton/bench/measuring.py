"""One measurement, or a sweep of them, from a configuration to its figures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from baton.bench.config import DEFAULT_RATE, LoadConfig, SweepConfig
from baton.bench.driver import Run, Watcher, run_plan
from baton.bench.lengths import UNBOUNDED
from baton.bench.plan import make_plan
from baton.bench.results import Measurement, measure
from baton.bench.sweep import Point, best, next_rate, shortfall
from baton.bench.target import Target, connect
from baton.bench.traces import mean_rate, read_trace
from baton.config import require

PART_SEEDS = 1_000_003
"""From one part's seed of prompts to the next one's: further than anybody counts by hand."""


async def measure_once(address: str, config: LoadConfig, watch: Watcher | None = None) -> tuple[Measurement, Run]:
    """Connects, sends, sums up. Raises ConfigError, or Unavailable when nobody serves there."""
    make_plan(config, UNBOUNDED)  # what is wrong with a trace is told before anybody is asked
    async with connect(address, config) as target:
        return await measure_on(target, config, watch)


async def measure_on(
    target: Target, config: LoadConfig, watch: Watcher | None = None, part: int = 0
) -> tuple[Measurement, Run]:
    """The same on a connection that is there. Parts of one measurement have different prompts: those of an earlier part
    would be found in the server's prefix caches."""
    plan = make_plan(config, target.model.context_tokens)
    run = await run_plan(target, plan, replace(config, seed=config.seed + part * PART_SEEDS), watch)
    return measure(run, config, target.address, target.model.name), run


async def measure_sweep(
    address: str,
    config: LoadConfig,
    sweep: SweepConfig,
    watch: Watcher | None = None,
    told: Callable[[Point], None] = lambda point: None,
) -> tuple[Measurement, Run]:
    """The measurement of the best rate, or of the lowest when none reached the attainment, with all points.

    Each rate has the same pattern of arrivals and lengths, stretched, with prompts of its own, and starts when
    everything before it has ended.
    """
    require(config.arrival_kind != "steps", "sweep", "steps have rates of their own; it goes with other arrivals")
    points: list[Point] = []
    found: dict[float, tuple[Measurement, Run]] = {}
    start = _first_rate(config)
    async with connect(address, config) as target:
        while (rate := next_rate(points, start, sweep.attainment, sweep.tolerance)) is not None:
            found[rate] = await measure_on(target, replace(config, rate=rate), watch, part=len(points))
            summary, verdict = found[rate][0].summary, found[rate][0].verdict
            points.append(Point(rate, summary.attainment, summary.goodput, verdict.valid))
            told(points[-1])
    top = best(points, sweep.attainment)
    measured, run = found[top.rate if top else min(found)]
    verdict, why = measured.verdict, shortfall(points, sweep.attainment, sweep.tolerance)
    if why:
        verdict = replace(verdict, warnings=(*verdict.warnings, why))
    return replace(measured, verdict=verdict, search=sweep, sweep=tuple(points), found=top), run


def _first_rate(config: LoadConfig) -> float:
    if config.rate is None and config.arrival_kind == "trace":
        assert config.trace is not None, "checked by the configuration"
        return mean_rate(read_trace(config.trace, config.trace_format)) / config.time_scale or DEFAULT_RATE
    return config.rate or DEFAULT_RATE
