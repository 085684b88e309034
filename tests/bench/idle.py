"""What the unloaded system takes: the serving benchmarks' objectives are multiples of it."""

from __future__ import annotations

import itertools
import math
import statistics
from dataclasses import dataclass

from baton.bench.config import LoadConfig
from baton.bench.driver import run_plan
from baton.bench.plan import Plan, Planned
from baton.bench.target import Target, connect
from tests.bench.modes import Mode

STEP_SEQUENCES = 8
WARM_UP, PASSES, PROMPTS = 2, 3, 3
LONG_EVERY, STEPS_S = 5.0, 3.0
"""How many times as long as another a long prompt is given, and the seconds of eight sequences."""


@dataclass(frozen=True, slots=True)
class Idle:
    """Of the unloaded system, in milliseconds: the first token of a `prompt` and of a `long` one, of so many tokens,
    and a step of eight sequences."""

    prompt: int
    ttft: float
    long: int
    long_ttft: float
    step: float

    def longest_within(self, ttft: float) -> float:
        """Tokens of the longest prompt that is computed in so many milliseconds: a TTFT grows with the tokens and with
        their square, as both measured ones say."""
        square = (self.long_ttft / self.long - self.ttft / self.prompt) / (self.long - self.prompt)
        linear = self.ttft / self.prompt - square * self.prompt
        root = linear * linear + 4 * square * ttft
        return math.inf if root < 0 else 2 * ttft / (linear + math.sqrt(root))


async def idle_times(mode: Mode, prompt: int, long: int) -> Idle:
    """Of a cluster that is started for it."""
    config = LoadConfig(seed=99)
    async with mode.start() as address, connect(address, config) as target:
        return await idle_of(target, prompt, long, 1.0)


async def idle_of(target: Target, prompt: int, long: int, every_s: float) -> Idle:
    """Prompts, so far apart that each is alone, a long one, and a step of eight sequences, three times over, for a
    machine is not equally fast from one minute to the next; medians."""
    ids, at = itertools.count(), 0.0
    planned = dict[str, list[Planned]](warm=[], ttft=[], long=[], step=[])

    def plan(kind: str, tokens: int, outputs: int, rest_s: float) -> None:
        nonlocal at
        planned[kind].append(Planned(next(ids), at, tokens, outputs))
        at += rest_s

    for _ in range(WARM_UP):
        plan("warm", prompt, 1, every_s)
    for _ in range(PASSES):
        for _ in range(PROMPTS):
            plan("ttft", prompt, 1, every_s)
        plan("long", long, 1, LONG_EVERY * every_s)
        for _ in range(STEP_SEQUENCES):
            plan("step", 64, 64, 0.0)
        at += STEPS_S
    order = sorted(itertools.chain.from_iterable(planned.values()), key=lambda each: each.index)
    run = await run_plan(target, Plan(tuple(order), at), LoadConfig(seed=99))
    found = {record.planned.index: record for record in run.records}

    def median_ttft(kind: str) -> float:
        times = [time for each in planned[kind] if (time := found[each.index].ttft_ms) is not None]
        if len(times) < len(planned[kind]):
            raise RuntimeError(f"{len(planned[kind]) - len(times)} requests to an idle system had no first token")
        return statistics.median(times)

    gaps = [gap for each in planned["step"] for gap in found[each.index].gaps_ms]
    return Idle(prompt, median_ttft("ttft"), long, median_ttft("long"), statistics.median(gaps))
