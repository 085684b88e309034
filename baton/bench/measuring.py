"""One measurement, or a sweep of them, from a configuration to its figures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from baton.bench.config import DEFAULT_RATE, LoadConfig, SweepConfig
from baton.bench.figures.results import Measurement, measure
from baton.bench.schedule.lengths import UNBOUNDED
from baton.bench.schedule.plan import make_plan
from baton.bench.schedule.traces import mean_rate, read_trace
from baton.bench.sending.driver import LoadRun, Watcher, run_plan
from baton.bench.sending.target import LoadTarget, connect
from baton.bench.sweep import Point, best, next_rate, shortfall
from baton.config import require

PART_SEEDS = 1_000_003
"""From one part's seed of prompts to the next one's: further than anybody counts by hand."""


async def measure_once(address: str, config: LoadConfig, watch: Watcher | None = None) -> tuple[Measurement, LoadRun]:
    """Connects, sends, sums up. Raises ConfigError, or Unavailable when nobody serves there."""
    make_plan(config, UNBOUNDED)  # what is wrong with a trace is told before anybody is asked
    async with connect(address, config) as target:
        return await measure_on(target, config, watch)


async def measure_on(
    target: LoadTarget, config: LoadConfig, watch: Watcher | None = None, part: int = 0
) -> tuple[Measurement, LoadRun]:
    """The same on a connection that is there. Parts of one measurement have different prompts: those of an earlier part
    would be found in the server's prefix caches."""
    plan = make_plan(config, target.model.context_tokens)
    run = await run_plan(target, plan, replace(config, seed=config.seed + part * PART_SEEDS), watch)
    return measure(run, config, target.address, target.model.name), run


@dataclass(slots=True)
class Search:
    """The rates that a sweep has tried so far, in their order, each with what was measured at it."""

    config: SweepConfig
    points: list[Point] = field(default_factory=list)
    found: dict[float, tuple[Measurement, LoadRun]] = field(default_factory=dict)

    def add(self, rate: float, measured: Measurement, run: LoadRun) -> Point:
        """One more."""
        self.found[rate] = measured, run
        self.points.append(Point(rate, measured.summary.attainment, measured.summary.goodput, measured.verdict.valid))
        return self.points[-1]

    def sum_up(self) -> tuple[Measurement, LoadRun]:
        """The measurement of the best rate, or of the lowest when none reached the attainment, with all points; a
        warning where the answer is not known to within the tolerance. At least one rate must have been tried."""
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
    """Tries rates until the search has its answer. Each has the same pattern of arrivals and lengths, stretched, with
    prompts of its own, and starts when everything before it has ended. What `search` holds outlives a cancellation.
    """
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
