"""Arrival times: a renewal process of rate one, mapped through the inverse of the cumulated rate.

The gaps of the process are gamma distributed with mean 1 and variance `burstiness` (shape 1 / burstiness): 1 makes it
Poisson, 0 even. The same seed gives the same pattern, stretched, at every rate.

A bursty process of some hundred requests misses its rate by a tenth or more, and differently at each rate, which would
look like a difference between rates. So a window gets its expected number of requests: the process conditioned on that
number of arrivals. That is exact for gamma gaps, whose ratios to their sum do not depend on the sum.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from baton.bench.schedule.config import DEFAULT_RATE, LoadConfig

ARRIVALS_STREAM = 1
EVEN = 1e-6
"""Less burstiness counts as none: its inverse, the distribution's shape, would overflow."""


@dataclass(frozen=True, slots=True)
class Profile:
    """Pieces of (seconds, requests per second), one after the other; repeated if `cyclic`."""

    pieces: tuple[tuple[float, float], ...]
    cyclic: bool = False

    @property
    def seconds(self) -> float:
        """Of all pieces; infinite if cyclic."""
        return float("inf") if self.cyclic else sum(seconds for seconds, _ in self.pieces)

    def expected(self, seconds: float) -> float:
        """Mean number of requests in the first `seconds`."""
        cycle_s = sum(length for length, _ in self.pieces)
        cycles, left = divmod(seconds, cycle_s) if self.cyclic else (0.0, min(seconds, cycle_s))
        total = cycles * sum(length * rate for length, rate in self.pieces)
        for length, rate in self.pieces:
            total += min(length, left) * rate
            left = max(0.0, left - length)
        return total


def profile_of(config: LoadConfig) -> Profile:
    """The rate over time, for all arrivals but a trace's."""
    rate = DEFAULT_RATE if config.rate is None else config.rate
    match config.arrival_kind:
        case "onoff":  # the mean over a whole cycle is the rate
            cycle = config.on_s + config.off_s
            return Profile(((config.on_s, rate * cycle / config.on_s), (config.off_s, 0.0)), cyclic=True)
        case "steps":
            return Profile(config.step_list())
    return Profile(((1e9, rate),), cyclic=True)


def arrival_times(profile: Profile, burstiness: float, seed: int, seconds: float | None = None) -> Iterator[float]:
    """Seconds from the start, ascending, until the profile ends. The first `seconds`, if given, have exactly their
    expected number of arrivals."""
    gaps = _unit_gaps(burstiness, np.random.default_rng([seed, ARRIVALS_STREAM]))
    if seconds is not None and burstiness >= EVEN:
        expected = profile.expected(seconds)
        gaps = _exactly(round(expected), expected, gaps)
    left = next(gaps)  # of the current gap, in the process's own time
    begin = 0.0
    for seconds, rate in itertools.cycle(profile.pieces) if profile.cyclic else profile.pieces:
        room = seconds * rate  # the piece, in the process's own time
        spent = left
        while spent < room:
            yield begin + spent / rate
            spent += next(gaps)
        left = spent - room
        begin += seconds


def _exactly(count: int, span: float, gaps: Iterator[float]) -> Iterator[float]:
    """The first `count` + 1 gaps, scaled to fill the span, so that `count` arrivals fall into it; then the rest. The
    last gap is at least a millionth of the span, lest rounding puts the arrival at the span's end inside."""
    first = list(itertools.islice(gaps, count + 1))
    first[-1] = max(first[-1], EVEN * sum(first))
    scale = span / sum(first)
    return itertools.chain((gap * scale for gap in first[:-1]), [first[-1] * scale + EVEN * span], gaps)


def _unit_gaps(burstiness: float, rng: np.random.Generator) -> Iterator[float]:
    while True:
        if burstiness < EVEN:
            yield 1.0
        else:
            yield from rng.gamma(1 / burstiness, burstiness, 256).tolist()
