"""When requests are due: a renewal process of rate one, run through a rate that changes over time.

The gaps of the process are gamma distributed with mean 1 and variance `burstiness` (shape 1 / burstiness): 1 makes it
Poisson, 0 even. Mapping it through the inverse of the cumulated rate keeps that at every rate, so the same seed gives
the same pattern, stretched, at another rate: runs of a sweep differ in nothing else.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from baton.bench.config import DEFAULT_RATE, LoadConfig

ARRIVALS_STREAM = 1
EVEN = 1e-6
"""Less burstiness than this is none: the distribution's shape, its inverse, would not be a number any more."""


@dataclass(frozen=True, slots=True)
class Profile:
    """Pieces of (seconds, requests per second), one after the other; over and over when `cyclic`."""

    pieces: tuple[tuple[float, float], ...]
    cyclic: bool = False

    @property
    def seconds(self) -> float:
        """Of all pieces; infinite when cyclic."""
        return float("inf") if self.cyclic else sum(seconds for seconds, _ in self.pieces)


def profile_of(config: LoadConfig) -> Profile:
    """The rate over time that a configuration without a trace's times asks for."""
    rate = DEFAULT_RATE if config.rate is None else config.rate
    match config.arrival_kind:
        case "onoff":  # the mean over a whole cycle is the rate
            cycle = config.on_s + config.off_s
            return Profile(((config.on_s, rate * cycle / config.on_s), (config.off_s, 0.0)), cyclic=True)
        case "steps":
            return Profile(config.step_list())
    return Profile(((1e9, rate),), cyclic=True)


def arrival_times(profile: Profile, burstiness: float, seed: int) -> Iterator[float]:
    """Seconds from the start, ascending; ends only with the profile."""
    gaps = _unit_gaps(burstiness, np.random.default_rng([seed, ARRIVALS_STREAM]))
    left = next(gaps)  # of the gap under way, in the process's own time
    begin = 0.0
    for seconds, rate in itertools.cycle(profile.pieces) if profile.cyclic else profile.pieces:
        room = seconds * rate  # of the process's time that the piece holds
        spent = left
        while spent < room:
            yield begin + spent / rate
            spent += next(gaps)
        left = spent - room
        begin += seconds


def _unit_gaps(burstiness: float, rng: np.random.Generator) -> Iterator[float]:
    while True:
        if burstiness < EVEN:
            yield 1.0
        else:
            yield from rng.gamma(1 / burstiness, burstiness, 256).tolist()
