"""Runs one measurement, or a sweep of them, from a configuration to its figures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from baton.bench.figures.results import Measurement, measure
from baton.bench.schedule.config import DEFAULT_RATE, LoadConfig, SweepConfig
from baton.bench.schedule.lengths import UNBOUNDED
from baton.bench.schedule.plan import make_plan
from baton.bench.schedule.traces import mean_rate, read_trace
from baton.bench.sending.driver import LoadRun, LoadTarget, Watcher, connect, run_plan
from baton.bench.sweep import Point, best, next_rate, shortfall
from baton.config import require

PART_SEEDS = 1_000_003
"""The distance between the prompt seeds of two parts, beyond seeds that users choose."""


async def measure_once(address: str, config: LoadConfig, watch: Watcher | None = None) -> tuple[Measurement, LoadRun]:
    """Raises ConfigError, or Unavailable without a server at the address."""
    make_plan(config, UNBOUNDED)  # a bad trace raises before the connection
    async with connect(address, config) as target:
        return await measure_on(target, config, watch)


async def measure_on(
    target: LoadTarget, config: LoadConfig, watch: Watcher | None = None, part: int = 0
) -> tuple[Measurement, LoadRun]:
    """Measures over an open connection. Each `part` of a measurement has its own prompts: those of another part
    would be in the server's prefix caches."""
    plan = make_plan(config, target.model.context_tokens)
    run = await run_plan(target, plan, replace(config, seed=config.seed + part * PART_SEEDS), watch)
    return measure(run, config, target.address, target.model.name), run


@dataclass(slots=True)
class Search:
    """The points of a sweep so far, in order, and the measurement of each rate."""

    config: SweepConfig
    points: list[Point] = field(default_factory=list)
    found: dict[float, tuple[Measurement, LoadRun]] = field(default_factory=dict)

    def add(self, rate: float, measured: Measurement, run: LoadRun) -> Point:
        self.found[rate] = measured, run
        self.points.append(Point(rate, measured.summary.attainment, measured.summary.goodput, measured.verdict.valid))
        return self.points[-1]

    def sum_up(self) -> tuple[Measurement, LoadRun]:
        """The measurement of the best rate, else of the lowest, with all points, and with a warning if the best rate is
        not known to within the tolerance. At least one rate must have been tried."""
        top = best(self.points, self.config.attainment)
        measured, run = self.found[top.rate if top else min(self.found)]
        verdict, why = measured.verdict, shortfall(self.points, self.config.attainment, self.config.tolerance)
        if why:
            verdict = replace(verdict, warnings=(*verdict.warnings, why))
        return replace(measured, verdict=verdict, search=self.config, sweep=tuple(self.points), found=top), run


async def measure_sweep(
    address: str,
    config: LoadConfig,
    search: Search,
    watch: Watcher | None = None,
    told: Callable[[Point], None] = lambda point: None,
) -> tuple[Measurement, LoadRun]:
    """Tries rates until the search has its answer. Each rate has the same pattern of arrivals and lengths, stretched,
    with prompts of its own, and starts when the one before has ended. `search` keeps its points on cancellation."""
    require(config.arrival_kind != "steps", "sweep", "steps have rates of their own; it goes with other arrivals")
    start, wanted = _first_rate(config), search.config
    async with connect(address, config) as target:
        while (rate := next_rate(search.points, start, wanted.attainment, wanted.tolerance)) is not None:
            measured, run = await measure_on(target, replace(config, rate=rate), watch, part=len(search.points))
            told(search.add(rate, measured, run))
    return search.sum_up()


def _first_rate(config: LoadConfig) -> float:
    if config.rate is None and config.arrival_kind == "trace":
        assert config.trace is not None, "checked by the configuration"
        return mean_rate(read_trace(config.trace, config.trace_format)) / config.time_scale or DEFAULT_RATE
    return config.rate or DEFAULT_RATE
