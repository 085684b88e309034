"""The cost model of a worker's steps and handoffs, learned online from its own times. Seconds throughout.

    a prefill chunk   fixed + per_token * n + per_pair * n * (c + n / 2)     n new tokens behind c that are in the KV
    a decode step     fixed + per_sequence * sequences + per_resident * resident tokens

A mixed step costs the decode step plus the chunk without its fixed part, times `mixed`: the recent ratio of mixed
steps' times to that sum, which exceeds 1 under load, when other cores compute too.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

FORGETTING = 0.98
"""Decay of an observation's weight with each further one: about 50 steps are remembered."""
TRUST, NO_TRUST = 3e-3, 1e-5
"""Weights of the ridge towards a measured prior, and towards zero without one, so that the equations can be solved.

The prior decides where observations are few or noisy: chunks of 46 to 50 tokens do not predict one of 300. With 1e-5
one such prediction in ten was a fifth of the true time, after steps that took 0 to 80 % longer; with 3e-3 most are
within a tenth."""
OUTLIER = 3.0
"""A residual is clipped to this many times the usual one."""
LEAST_CHUNK = 4
"""The smallest chunk beside residents, even if their objectives leave less: a started prompt must end."""
ALONE_CHUNK = 64
"""The smallest chunk in a step without residents: in a smaller one, reading the weights would dominate."""
MIXED_GAIN, MIXED_MOST = 0.1, 3.0
"""The weight of one mixed step in `mixed`, and the largest ratio that it may contribute."""
MARGIN = 0.9
"""The share of an objective's slack that chunks may use."""
HANDOFF_S = 0.005
"""How much a handoff prolongs the first gap between tokens: the default until handoffs are observed, and the minimum
that a decode worker assumes."""
HANDOFF_WINDOW, HANDOFF_SHARE = 64, 0.9
"""Of the last handoffs, the share that took at most the expected time."""
HANDOFF_PRIOR = (HANDOFF_S,) * 20
"""Observations to begin with: the first handoff includes the connection, so that it shows nothing."""
STRETCH = 3.0
"""A chunk may prolong a step without objectives to this many times its time."""
FIXED_SHARE = 0.2
"""The largest share of fixed cost in a prefill step. A step with more is filled up with less urgent prompts, for which
the urgent one then waits."""
LATE_CHUNK = 32
"""The smallest step of a prompt that can't be in time, after which prompts that can be go on. With a fixed cost of a
twentieth, 0.1 s a step here, 1 % fewer requests were in time."""
SOLVE_ALWAYS, SOLVE_EVERY = 32, 8
"""The equations are solved for each of the first observations, then for every eighth, to save time in a step."""
COEFFICIENTS = ("chunk", "per_token", "per_pair", "step", "per_sequence", "per_resident")
"""The fields of `StepCost` in seconds."""


class StepShape(NamedTuple):
    """A step's work. `pairs` sums n * (c + n / 2) over its chunks; decoding attends to the resident tokens."""

    new_tokens: int = 0
    pairs: float = 0.0
    sequences: int = 0
    resident_tokens: int = 0


@dataclass(frozen=True, slots=True)
class StepCost:
    """The coefficients, none negative; see the module. A phase that a worker never computed has zeros."""

    chunk: float = 0.0
    per_token: float = 0.0
    per_pair: float = 0.0
    step: float = 0.0
    per_sequence: float = 0.0
    per_resident: float = 0.0
    mixed: float = 1.0

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            assert math.isfinite(value), f"{name} is finite"
            assert value >= 0, f"{name} is not negative"
        assert self.mixed > 0, "a step takes time"

    @property
    def knows_prefill(self) -> bool:
        return self.per_token > 0 or self.chunk > 0

    @property
    def knows_decode(self) -> bool:
        return self.step > 0 or self.per_sequence > 0

    def seconds(self, shape: StepShape) -> float:
        adds = self._adds(shape.new_tokens, shape.pairs)
        if not shape.sequences:
            return self.chunk + adds
        decode = self.decode(shape.sequences, shape.resident_tokens)
        return self.mixed * (decode + adds) if shape.new_tokens else decode

    def decode(self, sequences: float, resident_tokens: float) -> float:
        return self.step + self.per_sequence * sequences + self.per_resident * resident_tokens

    def prefill(self, new_tokens: int, cached_tokens: int, chunk_tokens: int) -> float:
        """A whole prompt, alone, in chunks of at most `chunk_tokens`."""
        chunks = -(-new_tokens // chunk_tokens)
        return chunks * self.chunk + self._adds(new_tokens, pairs(new_tokens, cached_tokens))

    def fits(self, seconds: float, cached_tokens: int, most: int) -> int:
        """The largest chunk behind `cached_tokens` that adds at most `seconds` to a step; 0 to `most` tokens."""
        linear = self.per_token + self.per_pair * cached_tokens
        if seconds <= 0 or (linear <= 0 and self.per_pair <= 0):
            return 0 if seconds <= 0 else most
        if self.per_pair <= 0:
            return int(min(most, seconds / linear))
        root = math.sqrt(linear * linear + 2 * self.per_pair * seconds)
        return int(min(most, (root - linear) / self.per_pair))

    def fits_beside(self, step_s: float, limit_s: float | None, cached_tokens: int, most: int) -> int:
        """The largest chunk beside a decode step of `step_s` that keeps `limit_s`, the strictest objective of its
        sequences, or `STRETCH` without one; 0 to `most` tokens. Schedulers compute at least `LEAST_CHUNK` all the same;
        placement takes less for a missed objective."""
        spare = (STRETCH - 1) * step_s if limit_s is None else limit_s * MARGIN / self.mixed - step_s
        return self.fits(spare, cached_tokens, most)

    def fits_alone(self, limit_s: float | None, cached_tokens: int, most: int) -> int:
        """The same without sequences, at least `ALONE_CHUNK`: sequences that arrive meanwhile wait for the step."""
        if limit_s is None:
            return most
        return min(most, max(ALONE_CHUNK, self.fits(limit_s * MARGIN - self.chunk, cached_tokens, most)))

    def making_way(self, most: int) -> int:
        """Tokens of a late prompt's step."""
        return min(most, max(LATE_CHUNK, self.worth_computing(self.chunk, most)))

    def worth_computing(self, fixed_s: float, most: int) -> int:
        """The fewest prompt tokens with which `fixed_s` is at most `FIXED_SHARE` of a step; at most `most`."""
        wanted = fixed_s * (1 / FIXED_SHARE - 1)
        return most if wanted >= self.per_token * most else math.ceil(wanted / self.per_token)

    def _adds(self, new_tokens: int, attended: float) -> float:
        return self.per_token * new_tokens + self.per_pair * attended


def pairs(new_tokens: int, cached_tokens: int) -> float:
    """Query and key pairs of a chunk."""
    return new_tokens * (cached_tokens + new_tokens / 2)


class Fit:
    """Recursive least squares on relative residuals, with forgetting, for three coefficients.

    Normal equations with a ridge towards the prior: a direction that the load does not exercise returns to the prior
    instead of drifting. Outliers are clipped (Huber's M-estimator, Ann. Math. Stat. 35:73).
    """

    def __init__(self, scales: Sequence[float], prior: Sequence[float] = (0.0, 0.0, 0.0)) -> None:
        """`scales` are the features' typical sizes, for well conditioned equations."""
        self._scales = tuple(scales)
        self._prior = [coefficient * scale for coefficient, scale in zip(prior, scales, strict=True)]
        self._trust = TRUST if any(self._prior) else NO_TRUST
        self._solution = list(self._prior)
        self._sums = [0.0] * 9  # xx, xy, xz, yy, yz, zz of the features, then each with the time
        self._usual = 0.25  # relative residual
        self._count = 0

    def observe(self, features: tuple[float, float, float], seconds: float) -> None:
        assert seconds > 0, "a step takes time"
        x, y, z = features[0] / self._scales[0], features[1] / self._scales[1], features[2] / self._scales[2]
        p, q, r = self._solution
        expected = p * x + q * y + r * z
        if expected > 0 and self._count >= 3:
            residual = seconds / expected - 1
            bound = OUTLIER * max(self._usual, 0.02)
            self._usual += 0.05 * (min(abs(residual), 2 * bound) - self._usual)
            seconds = expected * (1 + min(max(residual, -bound), bound))
        weight = 1 / seconds**2
        new = (x * x, x * y, x * z, y * y, y * z, z * z, x * seconds, y * seconds, z * seconds)
        self._sums = [FORGETTING * old + weight * now for old, now in zip(self._sums, new, strict=True)]
        if self._count < SOLVE_ALWAYS or self._count % SOLVE_EVERY == 0:
            self._solution = self._solve((0, 1, 2))
        self._count += 1

    def coefficients(self) -> tuple[float, float, float]:
        """The latest solution, none negative."""
        first, second, third = (value / scale for value, scale in zip(self._solution, self._scales, strict=True))
        return first, second, third

    def _solve(self, active: tuple[int, ...]) -> list[float]:
        """Least squares over the active features; drops the most negative one and solves again."""
        xx, xy, xz, yy, yz, zz = self._sums[:6]
        matrix = ((xx, xy, xz), (xy, yy, yz), (xz, yz, zz))
        ridge = self._trust * max((xx + yy + zz) / 3, 1e-12)
        rows = [
            [matrix[i][j] + (ridge if i == j else 0.0) for j in active] + [self._sums[6 + i] + ridge * self._prior[i]]
            for i in active
        ]
        found = dict(zip(active, _eliminate(rows), strict=True))
        worst = min(found, key=lambda i: found[i])
        if found[worst] < 0 and len(active) > 1:
            return self._solve(tuple(i for i in active if i != worst))
        return [max(found.get(i, 0.0), 0.0) for i in range(3)]


def _eliminate(rows: list[list[float]]) -> list[float]:
    """Solves a small positive definite system; each row ends with its right-hand side."""
    size = len(rows)
    for column in range(size):
        pivot = rows[column][column]
        for row in range(column + 1, size):
            factor = rows[row][column] / pivot
            rows[row] = [x - factor * y for x, y in zip(rows[row], rows[column], strict=True)]
    solution = [0.0] * size
    for row in reversed(range(size)):
        known = sum(rows[row][column] * solution[column] for column in range(row + 1, size))
        solution[row] = (rows[row][size] - known) / rows[row][row]
    return solution


class CostModel:
    """A worker's cost, learned from its steps. Not thread-safe, but any thread may read `cost`."""

    def __init__(self, measured: Iterable[tuple[StepShape, float]] = ()) -> None:
        """`measured` are the steps of a self-measurement, which give the prior."""
        first = _Fits()
        for shape, seconds in measured:
            first.observe(shape, seconds)
        self.cost = first.cost()
        self.error = 0.0
        """Moving mean of the relative error of predicted step times."""
        self._fits = _Fits(self.cost)
        self._mixed = 1.0

    def observe(self, shape: StepShape, seconds: float) -> None:
        if seconds <= 0:
            return
        predicted = self.cost.seconds(shape)
        if predicted > 0:
            self.error += 0.05 * (min(abs(predicted / seconds - 1), 4.0) - self.error)
            if shape.new_tokens and shape.sequences:
                ratio = self._mixed * seconds / predicted
                self._mixed += MIXED_GAIN * (min(max(ratio, 1 / MIXED_MOST), MIXED_MOST) - self._mixed)
        self._fits.observe(shape, seconds)
        self.cost = replace(self._fits.cost(), mixed=self._mixed)


class _Fits:
    def __init__(self, prior: StepCost | None = None) -> None:
        known = prior or StepCost()
        self._chunks = Fit((1.0, 256.0, 256.0 * 512), (known.chunk, known.per_token, known.per_pair))
        self._steps = Fit((1.0, 8.0, 4096.0), (known.step, known.per_sequence, known.per_resident))

    def observe(self, shape: StepShape, seconds: float) -> None:
        if shape.new_tokens and shape.sequences:
            return  # a mixed step shows the sum of both parts, not each
        if shape.new_tokens:
            self._chunks.observe((1.0, shape.new_tokens, shape.pairs), seconds)
        elif shape.sequences:
            self._steps.observe((1.0, shape.sequences, shape.resident_tokens), seconds)

    def cost(self) -> StepCost:
        return StepCost(*self._chunks.coefficients(), *self._steps.coefficients())


class HandoffTimes:
    """Seconds from a first token until its sequence is resident, of the last handoffs to one decode worker."""

    def __init__(self) -> None:
        self._seconds: deque[float] = deque(maxlen=HANDOFF_WINDOW)
        self.expected_s = HANDOFF_S
        """The time that most handoffs do not exceed."""

    def __len__(self) -> int:
        return len(self._seconds)

    def observe(self, seconds: float) -> None:
        """`seconds` is 0 for a sequence that was resident before its first token."""
        self._seconds.append(seconds)
        ordered = sorted((*self._seconds, *HANDOFF_PRIOR[len(self._seconds) :]))
        self.expected_s = ordered[int(HANDOFF_SHARE * len(ordered))]
