"""Distributions of prompt and output lengths, parsed from a text."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite, log
from typing import TYPE_CHECKING

from baton.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np

FORMS = "N, uniform:LOW:HIGH or lognormal:MEDIAN:SIGMA[:MAX]"


@dataclass(frozen=True, slots=True)
class Fixed:
    tokens: int

    def draw(self, rng: np.random.Generator) -> int:
        return self.tokens


@dataclass(frozen=True, slots=True)
class Uniform:
    """Integers from `low` to `high`, both included."""

    low: int
    high: int

    def draw(self, rng: np.random.Generator) -> int:
        return int(rng.integers(self.low, self.high + 1))


@dataclass(frozen=True, slots=True)
class Lognormal:
    """exp(N(log median, sigma)), clipped to 1 to `most`."""

    median: float
    sigma: float
    most: int

    def draw(self, rng: np.random.Generator) -> int:
        return max(1, round(min(float(self.most), float(rng.lognormal(log(self.median), self.sigma)))))


Lengths = Fixed | Uniform | Lognormal
UNBOUNDED = 1 << 20


def parse_lengths(text: str, field: str) -> Lengths:
    """Parses one of FORMS. Raises ConfigError naming the field."""
    kind, *numbers = text.split(":")
    try:
        found = _parse(kind, numbers)
    except ValueError:
        found = None
    if found is None:
        raise ConfigError(f"{field}: expected {FORMS}, with at least 1 token, not {text!r}")
    return found


def _parse(kind: str, numbers: list[str]) -> Lengths | None:
    match kind, numbers:
        case "uniform", [low, high]:
            return Uniform(int(low), int(high)) if 1 <= int(low) <= int(high) else None
        case "lognormal", [median, sigma, *rest] if len(rest) <= 1:
            most = int(rest[0]) if rest else UNBOUNDED
            good = float(median) >= 1 and isfinite(float(median)) and 0 <= float(sigma) < 10 and most >= 1
            return Lognormal(float(median), float(sigma), most) if good else None
        case _, []:
            return Fixed(int(kind)) if int(kind) >= 1 else None
    return None
