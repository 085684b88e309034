"""Draws a token: a pure function of logits, parameters, seed, position and the tokens so far.

No generator state passes from step to step: the random number of a token at a position depends on (seed, position,
token) alone, so that a sequence draws the same on every worker, in every batch and after any number of failovers.

A token is drawn by an exponential race (the Gumbel-max trick): each candidate draws an arrival time with its weight as
the rate, and the first one wins. Unlike with inverse transform sampling, a candidate that rounding puts in or out at a
filter's edge changes the draw only if it would win; it does not shift the others.

The order is vLLM's: penalties (repetition, frequency, presence), temperature, min_p, top_k, top_p, draw. Reported
log-probabilities are the model's own, from the logits before all of these. Arithmetic is in float64; ties go to the
lower token id.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from baton.engine.api import Sequence
from baton.spec import Sampling, TokenLogprobs

Logits = npt.NDArray[np.float32]
Scores = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


class Penalties:
    """Counts a sequence's token ids, for penalties. A step costs O(vocabulary), whatever the context's length.

    Repetition (Keskar et al., arXiv 1909.05858, as Hugging Face and vLLM apply it) covers prompt and output; presence
    and frequency (OpenAI's definition) cover the output alone.
    """

    def __init__(self, sampling: Sampling, prompt_tokens: int) -> None:
        self._sampling = sampling
        self._prompt_tokens = prompt_tokens
        self._counted = 0
        self._held: npt.NDArray[np.bool_] = np.zeros(0, np.bool_)
        self._in_output: npt.NDArray[np.float64] = np.zeros(0)

    @classmethod
    def for_sampling(cls, sequence: Sequence) -> Penalties | None:
        """None if the parameters penalise nothing."""
        sampling = sequence.sampling
        given = sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty
        return None if given == (1.0, 0.0, 0.0) else cls(sampling, sequence.prompt_tokens)

    def observe(self, tokens: list[int], vocabulary: int) -> None:
        """Counts the tokens appended since the last call."""
        if not len(self._held):
            self._held, self._in_output = np.zeros(vocabulary, np.bool_), np.zeros(vocabulary)
        fresh = np.asarray(tokens[self._counted :], np.int64)
        self._held[fresh] = True
        np.add.at(self._in_output, fresh[max(0, self._prompt_tokens - self._counted) :], 1.0)
        self._counted = len(tokens)

    def apply(self, scores: Scores) -> None:
        """Changes `scores` [vocabulary] in place: repetition first, then frequency and presence, as vLLM does."""
        sampling = self._sampling
        if sampling.repetition_penalty != 1.0:
            held = scores[self._held]
            factor = sampling.repetition_penalty
            scores[self._held] = np.where(held > 0, held / factor, held * factor)
        scores -= sampling.frequency_penalty * self._in_output
        scores -= sampling.presence_penalty * (self._in_output > 0)


def uniforms(seed: int, position: int, ids: Ids) -> Scores:
    """A number in (0, 1) for each token id at this position of a stream: SplitMix64 (Steele, Lea and Flood, OOPSLA
    2014), keyed by seed and position. Mixing the seed first gives unrelated streams to neighbouring seeds."""
    bits = _mix((ids.astype(np.uint64) + np.uint64(1)) * np.uint64(_GOLDEN) + np.uint64(stream_key(seed, position)))
    return ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


def stream_key(seed: int, position: int) -> int:
    """64 bits for a position of a seed's stream."""
    return _mix_int(_mix_int(seed) + (position + 1) * _GOLDEN)


def sample(logits: Logits, sampling: Sampling, position: int, penalties: Penalties | None = None) -> int:
    """Draws the token for the absolute `position` from `logits` [vocabulary], which stay unchanged. `penalties` have
    observed every token before `position`; None if the parameters penalise nothing."""
    if penalties is None and sampling.temperature == 0.0:
        return int(logits.argmax())
    scores = logits.astype(np.float64)
    if penalties is not None:
        penalties.apply(scores)
    if sampling.temperature == 0.0:
        return int(scores.argmax())
    # Relative to the best score, so that a temperature near zero does not overflow.
    scores = (scores - scores.max()) / sampling.temperature
    ids, weights = _filtered(scores, sampling)
    return _race(ids, weights, sampling.seed, position)


def logprobs(logits: Logits, token: int, top: int) -> TokenLogprobs:
    """The log-probabilities of `token` and of the `top` best ids, best first, under the raw `logits`."""
    wide = logits.astype(np.float64)
    best = wide.max()
    log_total = best + math.log(np.exp(wide - best).sum())
    ids = _best(wide, top)
    pairs = tuple((int(index), float(wide[index] - log_total)) for index in ids)
    return TokenLogprobs(float(wide[token] - log_total), pairs)


def _mix_int(value: int) -> int:
    """`_mix` of 64 bits, in Python's integers."""
    value &= _MASK
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & _MASK
    return value ^ (value >> 31)


def _mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """SplitMix64's finaliser: a bijection of 64 bits."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _filtered(scores: Scores, sampling: Sampling) -> tuple[Ids | None, Scores]:
    """(the remaining ids in rising order, None for all; their weights, not normalised). The best score is 0."""
    ids: Ids | None = None
    if sampling.min_p > 0.0:
        ids = np.flatnonzero(scores >= math.log(sampling.min_p))
    if 0 < sampling.top_k < len(scores):
        kept = scores if ids is None else scores[ids]
        best = np.sort(_best(kept, sampling.top_k))
        ids = best if ids is None else ids[best]
    weights = np.exp(scores if ids is None else scores[ids])
    if sampling.top_p < 1.0:
        kept_by_mass = _nucleus(weights, sampling.top_p)
        ids = kept_by_mass if ids is None else ids[kept_by_mass]
        weights = weights[kept_by_mass]
    return ids, weights


def _best(scores: Scores, count: int) -> Ids:
    """Indices of the `count` highest scores, best first, equal ones by index."""
    count = min(count, len(scores))
    if count <= 0:
        return np.zeros(0, np.int64)
    threshold = np.partition(scores, len(scores) - count)[len(scores) - count]
    candidates = np.flatnonzero(scores >= threshold)
    order = np.argsort(-scores[candidates], kind="stable")
    return candidates[order[:count]]


def _nucleus(weights: Scores, top_p: float) -> Ids:
    """Rising indices of the smallest set, best first, whose share reaches `top_p` (Holtzman, arXiv 1904.09751)."""
    goal = top_p * weights.sum()
    count = 256  # most nuclei are small: sort a few, and more only if these do not suffice
    while True:
        order = _best(weights, count)
        reached = np.cumsum(weights[order])
        if reached[-1] >= goal or len(order) == len(weights):
            needed = int(np.searchsorted(reached, goal, side="left")) + 1
            return np.sort(order[:needed])
        count *= 16


def _race(ids: Ids | None, weights: Scores, seed: int, position: int) -> int:
    """The candidate with the smallest -log(1 - u) / weight; ties go to the lower id.

    u / weight is a lower bound without a logarithm; only candidates whose bound beats the exact time of the one with
    the least bound are computed exactly.
    """
    candidates = np.arange(len(weights)) if ids is None else ids
    draws = uniforms(seed, position, candidates)
    with np.errstate(divide="ignore", over="ignore"):  # a weight that underflowed never arrives
        bounds = draws / weights
        first = int(bounds.argmin())
        limit = -math.log1p(-draws[first]) / weights[first]
        near = np.flatnonzero(bounds <= limit)
        times = -np.log1p(-draws[near]) / weights[near]
    return int(candidates[near[times.argmin()]])
