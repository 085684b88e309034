"""The unloaded system's times; the serving benchmarks' objectives are multiples of them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from baton.bench.schedule.config import LoadConfig
from baton.bench.schedule.plan import LoadPlan, Planned
from baton.bench.sending.driver import LoadTarget, connect, run_plan
from benchmarks.serving.modes import Mode

STEP_SEQUENCES, STEP_TOKENS = 8, 64
WARM_UP, PASSES, PROMPTS = 2, 3, 3
LONG_EVERY, STEPS_S = 5.0, 3.0
"""Time for a long prompt in multiples of another's, and seconds for eight sequences."""


@dataclass(frozen=True, slots=True)
class Idle:
    """Milliseconds of the unloaded system: TTFT by the prompt's tokens, the shortest first, and a step of eight
    sequences."""

    ttfts: dict[int, float]
    step: float

    @property
    def ttft(self) -> float:
        """Of the median prompt, the shortest measured."""
        return next(iter(self.ttfts.values()))

    def longest_within(self, ttft: float) -> float:
        """Tokens of the longest prompt computed within `ttft`: between measured prompts, and beyond the last, TTFT is a
        power of the tokens. Raises RuntimeError if a longer prompt took no more time."""
        found = 0.0
        for (tokens, its), (more, longer) in pairwise(self.ttfts.items()):
            if longer <= its:
                raise RuntimeError(f"{more} tokens took {longer:.0f} ms, {tokens} {its:.0f}: something else ran")
            found = tokens * (more / tokens) ** (math.log(ttft / its) / math.log(longer / its))
            if found <= more:
                break
        return found


async def idle_times(mode: Mode, prompts: Sequence[int]) -> Idle:
    """The times of a fresh cluster."""
    config = LoadConfig(seed=99)
    async with mode.start() as address, connect(address, config) as target:
        return await idle_of(target, prompts, 1.0)


async def idle_of(target: LoadTarget, prompts: Sequence[int], every_s: float) -> Idle:
    """Medians over prompts of these lengths, the median one first, so far apart that each is alone, and steps of eight
    sequences; in three passes, since a machine's speed changes from minute to minute."""
    median, *longer = prompts
    planned: list[Planned] = []
    at = 0.0

    def plan(tokens: int, outputs: int, rest_s: float) -> None:
        nonlocal at
        planned.append(Planned(len(planned), at, tokens, outputs))
        at += rest_s

    for _ in range(WARM_UP):
        plan(median, 1, every_s)
    for _ in range(PASSES):
        for _ in range(PROMPTS):
            plan(median, 1, every_s)
        for tokens in longer:
            plan(tokens, 1, LONG_EVERY * every_s)
        for _ in range(STEP_SEQUENCES):
            plan(STEP_TOKENS, STEP_TOKENS, 0.0)
        at += STEPS_S
    run = await run_plan(target, LoadPlan(tuple(planned), at), LoadConfig(seed=99))
    if failed := [record.status for record in run.records if record.ttft_ms is None]:
        raise RuntimeError(f"{len(failed)} requests to an idle system had no first token: {failed[0]}")
    alone = [record for record in run.records[WARM_UP:] if record.planned.output_tokens == 1]
    ttfts = {
        tokens: statistics.median(record.ttft_ms or 0.0 for record in alone if record.planned.prompt_tokens == tokens)
        for tokens in prompts
    }
    gaps = [gap for record in run.records if record.planned.output_tokens > 1 for gap in record.gaps_ms]
    return Idle(ttfts, statistics.median(gaps))
