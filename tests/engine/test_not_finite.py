"""Logits or KV that are not finite cost their own sequence, and nothing else in the batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from baton.config import WeightChoice
from baton.engine import stepper
from baton.engine.api import Sampled, Sequence, Work
from baton.engine.files.card import describe
from baton.engine.files.models import resolve
from baton.engine.native.engine import NativeEngine
from baton.engine.native.library import Library
from baton.engine.offline import OfflinePrompt, generate
from baton.engine.stepper import Stepper
from baton.errors import Internal
from baton.spec import Sampling
from tests.engine.conftest import VOCABULARY, Computing, Tiny, tokens_for

GREEDY = Sampling(temperature=0.0)
SAMPLINGS = {
    "greedy": GREEDY,
    "logprobs": Sampling(temperature=0.0, logprobs=3),
    "sampled": Sampling(temperature=0.8, top_p=0.9, top_k=20, min_p=0.01, seed=4),
    "penalties": Sampling(temperature=0.0, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.5),
}
BAD = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


@pytest.fixture
def engine(computing: Computing, tiny: Callable[[str], Tiny]) -> Stepper:
    """With room for a few sequences."""
    return computing.engine(tiny("llama"), blocks=16)


class Batch:
    """A victim and a healthy greedy sequence, which share every step."""

    def __init__(self, engine: Stepper, sampling: Sampling = GREEDY) -> None:
        self.engine = engine
        self.victim = Sequence(bytes(16), tokens_for(20, 1), 20, [1, 2, 3], 0, sampling)
        self.healthy = Sequence(bytes(16), tokens_for(23, 2), 23, [4, 5, 6], 0, GREEDY)

    def step(self) -> Sampled | None:
        """Computes all that is known, and appends what was drawn. Returns the victim's, None once that is out."""
        both = [sequence for sequence in (self.victim, self.healthy) if sequence.remaining]
        drawn = self.engine.step([Work(sequence, sequence.remaining) for sequence in both])
        for sequence, sampled in zip(both, drawn, strict=True):
            assert sampled is not None
            sequence.tokens += sampled.token_ids
        return drawn[0] if len(both) == 2 else None

    def healthy_goes_on_to(self, expected: list[int]) -> None:
        """It says the same."""
        while len(self.healthy.tokens) < len(expected):
            self.step()
        assert self.healthy.tokens == expected


def alone(engine: Stepper, count: int) -> list[int]:
    """What the healthy sequence says in a batch that is healthy."""
    batch = Batch(engine)
    for _ in range(count):
        batch.step()
    return batch.healthy.tokens


def poison_rows(engine: Stepper, monkeypatch: pytest.MonkeyPatch, change: Callable[[np.ndarray], None]) -> None:
    """Changes the logits of the first sequence of every step from now on."""
    forward = engine._forward

    def poisoned(batch: list[Work]) -> Any:
        sampled, logits = forward(batch)
        change(logits[sampled.index(0)])
        return sampled, logits

    monkeypatch.setattr(engine, "_forward", poisoned)


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("bad", BAD)
def test_one_logit_that_is_not_finite(
    engine: Stepper, monkeypatch: pytest.MonkeyPatch, bad: str, sampling: str
) -> None:
    expected = alone(engine, 3)
    for steps in (0, 1):  # at the first token, and in the middle
        batch = Batch(engine, SAMPLINGS[sampling])
        for _ in range(steps):
            batch.step()
        with monkeypatch.context() as patch:
            poison_rows(engine, patch, lambda row: row.__setitem__(VOCABULARY - 1, BAD[bad]))
            victim = batch.step()
        assert victim == Sampled((), (), f"logits are not finite at position {20 + steps}")
        batch.healthy_goes_on_to(expected)


def test_large_logits_are_finite(engine: Stepper, monkeypatch: pytest.MonkeyPatch) -> None:
    """Although their sum is not."""
    poison_rows(engine, monkeypatch, lambda row: row.fill(np.finfo(np.float32).max))
    batch = Batch(engine, SAMPLINGS["logprobs"])
    victim = batch.step()
    assert victim is not None
    assert victim.token_ids == (0,)
    assert math.isfinite(victim.logprobs[0].logprob)


def test_a_draw_that_raises(engine: Stepper, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, actual = alone(engine, 2), vars(stepper)["sample"]

    def broken(logits: Any, sampling: Sampling, *rest: Any) -> Any:
        if sampling is not GREEDY:
            raise ValueError("broken on purpose")
        return actual(logits, sampling, *rest)

    monkeypatch.setattr(stepper, "sample", broken)
    batch = Batch(engine, SAMPLINGS["sampled"])
    victim = batch.step()
    assert victim is not None
    assert victim.error == "no token could be drawn at position 20: ValueError: broken on purpose"
    batch.healthy_goes_on_to(expected)


@pytest.mark.parametrize("where", ["key", "value"])
@pytest.mark.parametrize("bad", ["nan", "inf"])
def test_kv_that_is_not_finite(engine: Stepper, bad: str, where: str) -> None:
    """One element of one position, written between two steps; that block's neighbours are untouched."""
    expected = alone(engine, 4)
    batch = Batch(engine)
    batch.step()
    engine.pool.blocks[1, -1, 0 if where == "key" else 1, :, 7, :] = BAD[bad]
    victim = batch.step()
    assert victim is not None
    assert victim.error == "logits are not finite at position 21"
    batch.healthy_goes_on_to(expected)
    engine.pool.blocks[1] = 0.0


@pytest.mark.parametrize("weights", ["bf16", "int8", "int4"])
def test_one_sequences_quantised_kv(kernels: Library, tiny: Callable[[str], Tiny], weights: WeightChoice) -> None:
    """All bits of its first block are set, scales included: those are NaN. Rows of quantised arithmetic do not mix."""
    description = describe(resolve(str(tiny("llama").folder)), "bfloat16", kv_dtype="int8")
    engine = NativeEngine.load(description, blocks=16, weights=weights)
    expected, batch = alone(engine, 4), Batch(engine)
    batch.step()
    engine.pool.blocks[1] = 255
    victim = batch.step()
    assert victim is not None
    assert victim.error == "logits are not finite at position 21"
    batch.healthy_goes_on_to(expected)


def test_offline_generation_raises(engine: Stepper, monkeypatch: pytest.MonkeyPatch) -> None:
    poison_rows(engine, monkeypatch, lambda row: row.__setitem__(0, math.nan))
    with pytest.raises(Internal, match="logits are not finite at position 20"):
        generate(engine, [OfflinePrompt(tuple(tokens_for(20, 1)))], blocks=8)
