"""What a step costs, and how that is learned: one linear model per worker, fitted online from its own step times.

    a prefill chunk   fixed + per_token * n + per_pair * n * (c + n / 2)     n new tokens behind c that are in the KV
    a decode step     fixed + per_sequence * sequences + per_resident * resident tokens

A step that does both costs the decode step and what the chunk adds to it, times what such steps have lately taken over
that sum: under load, when the other cores compute too. Seconds throughout.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

FORGETTING = 0.98
"""What an observation weighs after each further one: about 50 steps are remembered."""
TRUST, NO_TRUST = 3e-3, 1e-5
"""How much a prior weighs beside what is remembered; and where nothing was measured before, so that the equations can
be solved. It decides what observations leave open, and what they can't tell from noise: how chunks of 46 to 50 tokens
differ says nothing of one with 300. With 1e-5 such a prompt was predicted at a fifth of its time in one case of ten,
after steps that took 0 to 80 % longer; so it is within a tenth mostly."""
OUTLIER = 3.0
"""A residual counts for no more than so many times the usual one."""
LEAST_CHUNK = 4
"""Tokens of a chunk beside residents where their objectives leave less: a prompt that has started must end."""
ALONE_CHUNK = 64
"""Tokens of a chunk beside nobody: with fewer, reading the weights would take a good part of the step."""
MIXED_GAIN, MIXED_MOST = 0.1, 3.0
"""What one step with a chunk beside sequences weighs in their mean, and the most that one may be out by."""
MARGIN = 0.9
"""Of what an objective leaves, what is used."""
HANDOFF_S = 0.005
"""What the first gap between tokens is longer for blocks that are still on their way when the first token is drawn,
until handoffs were observed; and the least that a decode worker reckons with."""
STRETCH = 3.0
"""A step without objectives may take so many times as long with a chunk as without."""
FIXED_SHARE = 0.2
"""Of a step with prompts in it, what may be fixed cost. A step with more is filled up with less urgent prompts, for
which the first one then waits."""
LATE_CHUNK = 32
"""Tokens of a step of a prompt that can't be in time any more, if no more are worth it: whoever can be waits for such a
step to end. With steps in which the fixed cost was a twentieth, 0.1 s here, 1 % fewer requests were in time."""
SOLVE_ALWAYS, SOLVE_EVERY = 32, 8
"""The first observations are solved for one by one, later ones by eights: a step has better things to do."""
COEFFICIENTS = ("chunk", "per_token", "per_pair", "step", "per_sequence", "per_resident")
"""Those of `StepCost` that are seconds."""


class StepShape(NamedTuple):
    """What one step computes. `pairs` sums n * (c + n / 2) over its chunks; resident tokens are those attended to."""

    new_tokens: int = 0
    pairs: float = 0.0
    sequences: int = 0
    resident_tokens: int = 0


@dataclass(frozen=True, slots=True)
class StepCost:
    """The coefficients, none negative; see the module. A worker that never did one phase has zeros for it."""

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
        """One step."""
        if not shape.sequences:
            return self.chunk + self._adds(shape.new_tokens, shape.pairs)
        decode = self.decode(shape.sequences, shape.resident_tokens)
        adds = self._adds(shape.new_tokens, shape.pairs)
        return self.mixed * (decode + adds) if shape.new_tokens else decode

    def decode(self, sequences: float, resident_tokens: float) -> float:
        """A step without prefill."""
        return self.step + self.per_sequence * sequences + self.per_resident * resident_tokens

    def prefill(self, new_tokens: int, cached_tokens: int, chunk_tokens: int) -> float:
        """A whole prompt, computed alone in chunks of at most `chunk_tokens`."""
        chunks = -(-new_tokens // chunk_tokens)
        return chunks * self.chunk + self._adds(new_tokens, pairs(new_tokens, cached_tokens))

    def fits(self, seconds: float, cached_tokens: int, most: int) -> int:
        """The largest chunk behind `cached_tokens` that adds at most so much to a step; 0 to `most` tokens."""
        linear = self.per_token + self.per_pair * cached_tokens
        if seconds <= 0 or (linear <= 0 and self.per_pair <= 0):
            return 0 if seconds <= 0 else most
        if self.per_pair <= 0:
            return int(min(most, seconds / linear))
        root = math.sqrt(linear * linear + 2 * self.per_pair * seconds)
        return int(min(most, (root - linear) / self.per_pair))

    def fits_beside(self, step_s: float, limit_s: float | None, cached_tokens: int, most: int) -> int:
        """The largest chunk that a step of `step_s` has room for within the strictest objective among its sequences, or
        within `STRETCH` of itself where there is none; 0 to `most` tokens. Whoever sizes chunks takes `LEAST_CHUNK` at
        the least; whoever places prompts takes less for a missed objective."""
        spare = (STRETCH - 1) * step_s if limit_s is None else limit_s * MARGIN / self.mixed - step_s
        return self.fits(spare, cached_tokens, most)

    def fits_alone(self, limit_s: float | None, cached_tokens: int, most: int) -> int:
        """The same for a step without sequences, at least `ALONE_CHUNK`: who comes in meanwhile waits for its end."""
        if limit_s is None:
            return most
        return min(most, max(ALONE_CHUNK, self.fits(limit_s * MARGIN - self.chunk, cached_tokens, most)))

    def making_way(self, most: int) -> int:
        """Tokens of a step of a prompt that is late."""
        return min(most, max(LATE_CHUNK, self.worth_computing(self.chunk, most)))

    def worth_computing(self, fixed_s: float, most: int) -> int:
        """Prompt tokens from which on `fixed_s` is no more than `FIXED_SHARE` of a step; at most `most`."""
        wanted = fixed_s * (1 / FIXED_SHARE - 1)
        return most if wanted >= self.per_token * most else math.ceil(wanted / self.per_token)

    def _adds(self, new_tokens: int, attended: float) -> float:
        return self.per_token * new_tokens + self.per_pair * attended


def pairs(new_tokens: int, cached_tokens: int) -> float:
    """Query and key pairs of a chunk, as the model counts them."""
    return new_tokens * (cached_tokens + new_tokens / 2)


class Fit:
    """Recursive least squares with forgetting of relative residuals, for y = sum of three coefficients times features.

    Kept as normal equations with a ridge towards the prior, so that a direction that the load does not exercise falls
    back to the prior instead of drifting off. Outliers are pulled in (Huber's M-estimator, Ann. Math. Stat. 35:73).
    """

    def __init__(self, scales: Sequence[float], prior: Sequence[float] = (0.0, 0.0, 0.0)) -> None:
        """`scales` are the features' typical sizes: they make the equations well conditioned."""
        self._scales = tuple(scales)
        self._prior = [coefficient * scale for coefficient, scale in zip(prior, scales, strict=True)]
        self._trust = TRUST if any(self._prior) else NO_TRUST
        self._solution = list(self._prior)
        self._sums = [0.0] * 9  # xx, xy, xz, yy, yz, zz of the features, then each with the time
        self._usual = 0.25  # relative residual
        self._count = 0

    def observe(self, features: tuple[float, float, float], seconds: float) -> None:
        """One measurement; it must be positive."""
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
        """The best ones when it was last solved, none negative."""
        first, second, third = (value / scale for value, scale in zip(self._solution, self._scales, strict=True))
        return first, second, third

    def _solve(self, active: tuple[int, ...]) -> list[float]:
        """Least squares over the active features; a negative one is dropped and the rest solved again."""
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
    """Solves a small positive definite system given as rows with their right-hand side."""
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
    """A worker's own cost, learned from its steps. Not thread-safe; `cost` may be read from anywhere."""

    def __init__(self, measured: Iterable[tuple[StepShape, float]] = ()) -> None:
        """`measured` are steps of a self-measurement: what they show is the prior of all that follows."""
        first = _Fits()
        for shape, seconds in measured:
            first.observe(shape, seconds)
        self.cost = first.cost()
        self.error = 0.0
        """Mean relative error of predicted step times, exponentially forgotten."""
        self._fits = _Fits(self.cost)
        self._mixed = 1.0

    def observe(self, shape: StepShape, seconds: float) -> None:
        """A step took so long."""
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
            return  # a mixed step says little of either part, only of both together
        if shape.new_tokens:
            self._chunks.observe((1.0, shape.new_tokens, shape.pairs), seconds)
        elif shape.sequences:
            self._steps.observe((1.0, shape.sequences, shape.resident_tokens), seconds)

    def cost(self) -> StepCost:
        return StepCost(*self._chunks.coefficients(), *self._steps.coefficients())
