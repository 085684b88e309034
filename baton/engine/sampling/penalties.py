"""Penalties on tokens that a sequence already holds, kept up to date as tokens come.

Repetition (Keskar et al., arXiv 1909.05858, as Hugging Face and vLLM apply it) looks at prompt and output; presence
and frequency (OpenAI's definition) look at the output alone.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from baton.engine.api import Sequence
from baton.spec import Sampling

Scores = npt.NDArray[np.float64]


class Penalties:
    """Which ids a sequence holds and how often. A step costs the vocabulary's size, whatever the context's."""

    def __init__(self, sampling: Sampling, prompt_tokens: int) -> None:
        self._sampling = sampling
        self._prompt_tokens = prompt_tokens
        self._counted = 0
        self._held: npt.NDArray[np.bool_] = np.zeros(0, np.bool_)
        self._in_output: npt.NDArray[np.float64] = np.zeros(0)

    @classmethod
    def for_sampling(cls, sequence: Sequence) -> Penalties | None:
        """None where the parameters penalise nothing."""
        sampling = sequence.sampling
        neutral = (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) == (
            1.0,
            0.0,
            0.0,
        )
        return None if neutral else cls(sampling, sequence.prompt_tokens)

    def observe(self, tokens: list[int], vocabulary: int) -> None:
        """Counts the tokens that were appended since the last call."""
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
