"""The sampler as a pure function: what it depends on, what it does not, and that it draws what it should."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.engine.api import Sequence
from baton.engine.sampling import Logits, Penalties, logprobs, sample, uniforms
from baton.spec import Sampling

GREEDY = Sampling(temperature=0.0)
SEEDS = st.integers(0, 2**64 - 1)
POSITIONS = st.integers(0, 2**31)
PINNED = [0.6524484863740323, 0.5042931296073536, 0.9198290121681776]


def row(seed: int, size: int = 200, scale: float = 3.0) -> Logits:
    return (np.random.default_rng(seed).standard_normal(size) * scale).astype(np.float32)


def penalties(sampling: Sampling, prompt: list[int], output: list[int], vocabulary: int) -> Penalties:
    tokens = prompt + output
    made = Penalties.for_sampling(Sequence(bytes(16), tokens, len(prompt), [], 0, sampling))
    assert made is not None
    made.observe(tokens, vocabulary)
    return made


def softmax(scores: np.ndarray) -> np.ndarray:
    weights = np.exp(scores.astype(np.float64) - scores.max())
    shares: np.ndarray = weights / weights.sum()
    return shares


def chi_square(counts: np.ndarray, expected: np.ndarray) -> float:
    return float(((counts - expected) ** 2 / expected).sum())


def draws(logits: Logits, sampling: Sampling, count: int) -> np.ndarray:
    return np.bincount([sample(logits, sampling, position) for position in range(count)], minlength=len(logits))


@given(seed=SEEDS, position=POSITIONS, logits_seed=st.integers(0, 50))
def test_the_same_inputs_draw_the_same_and_change_nothing(seed: int, position: int, logits_seed: int) -> None:
    logits = row(logits_seed)
    before = logits.copy()
    sampling = Sampling(temperature=0.8, top_k=40, top_p=0.9, min_p=0.01, seed=seed)
    first = sample(logits, sampling, position)
    sample(row(logits_seed + 1), sampling, position + 1)
    assert sample(logits.copy(), sampling, position) == first
    assert np.array_equal(logits, before)


@given(seed=SEEDS, position=POSITIONS)
def test_uniforms_are_in_range_and_depend_on_all(seed: int, position: int) -> None:
    ids = np.arange(50)
    values = uniforms(seed, position, ids)
    assert ((values > 0) & (values < 1)).all()
    assert len(set(values)) == len(ids)
    assert not (values == uniforms((seed + 1) % 2**64, position, ids)).any()
    assert not (values == uniforms(seed, position + 1, ids)).any()
    assert uniforms(seed, position, ids[[7]])[0] == values[7]


def test_uniforms_never_change() -> None:
    """Streams that move between versions go on with the same draws."""
    found = [*uniforms(0, 0, np.array([0, 49_151])), *uniforms(42, 1000, np.array([7]))]
    assert found == PINNED


def test_uniforms_are_uniform_and_uncorrelated() -> None:
    one = np.array([3])
    along_ids = uniforms(1, 5, np.arange(20000))
    along_positions = np.array([uniforms(1, position, one)[0] for position in range(20000)])
    along_seeds = np.array([uniforms(seed, 5, one)[0] for seed in range(20000)])
    for values in (along_ids, along_positions, along_seeds):
        counts = np.histogram(values, bins=20, range=(0, 1))[0]
        assert chi_square(counts, np.full(20, 1000.0)) < 50
        assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.03


def test_a_candidate_at_a_filters_edge_moves_no_other() -> None:
    """What min_p lets in or leaves out changes a draw only where that very token would win."""
    logits = row(3, 400, 1.0)
    best = float(logits.max())
    lowest = float(np.sort(logits)[0])
    narrow, wide = (float(np.exp(lowest - best)) * factor for factor in (1.0001, 0.9999))
    changed = 0
    for position in range(3000):
        inside = sample(logits, Sampling(min_p=wide, seed=9), position)
        outside = sample(logits, Sampling(min_p=narrow, seed=9), position)
        if inside != outside:
            assert inside == int(logits.argmin())
            changed += 1
    assert changed <= 6


@given(logits_seed=st.integers(0, 1000), seed=SEEDS, temperature=st.floats(0.01, 5.0))
def test_top_k_of_one_is_greedy(logits_seed: int, seed: int, temperature: float) -> None:
    logits = np.round(row(logits_seed)).astype(np.float32)  # rounded, so that there are ties
    assert sample(logits, Sampling(temperature=temperature, top_k=1, seed=seed), 3) == sample(logits, GREEDY, 3)


def test_a_tiny_temperature_and_a_tiny_nucleus_are_greedy() -> None:
    logits = row(1)
    best = int(logits.argmax())
    assert sample(logits, Sampling(temperature=1e-6, seed=1), 0) == best
    assert sample(logits, Sampling(top_p=1e-9, seed=1), 0) == best
    assert sample(logits, Sampling(min_p=1.0, seed=1), 0) == best


def test_ties_go_to_the_lower_id() -> None:
    logits = np.zeros(10, np.float32)
    assert sample(logits, GREEDY, 0) == 0
    assert set(np.flatnonzero(draws(logits, Sampling(top_k=3), 200))) == {0, 1, 2}
    assert set(np.flatnonzero(draws(logits, Sampling(top_p=0.4), 200))) == {0, 1, 2, 3}


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_follow_the_softmax(temperature: float) -> None:
    logits, count = row(5, size=20, scale=1.0), 20000
    expected = softmax(logits / temperature) * count
    counts = draws(logits, Sampling(temperature=temperature, seed=11), count)
    assert chi_square(counts, expected) < 50  # 19 degrees of freedom, p = 0.0001


def test_filters_renormalise_what_is_left() -> None:
    logits, count = row(6, size=50, scale=1.5), 10000
    shares = softmax(logits)
    order = np.argsort(-shares)
    kept = {
        Sampling(top_k=5, seed=1): order[:5],
        Sampling(top_p=0.6, seed=1): order[: int(np.searchsorted(np.cumsum(shares[order]), 0.6)) + 1],
        Sampling(min_p=0.2, seed=1): np.flatnonzero(shares >= 0.2 * shares.max()),
    }
    for sampling, ids in kept.items():
        counts = draws(logits, sampling, count)
        assert set(np.flatnonzero(counts)) == set(ids.tolist())
        assert chi_square(counts[ids], shares[ids] / shares[ids].sum() * count) < 60


def test_top_p_is_measured_after_top_k() -> None:
    logits = np.log(np.array([0.4, 0.3, 0.2, 0.1], np.float32))
    # Of the best three alone, the first two hold 7/9; of all four, only 0.7.
    counts = draws(logits, Sampling(top_k=3, top_p=0.75), 500)
    assert set(np.flatnonzero(counts)) == {0, 1}


@given(st.integers(0, 300), st.floats(0.01, 1.0), st.integers(0, 400), st.floats(0.0, 1.0))
def test_filters_always_leave_something(seed: int, top_p: float, top_k: int, min_p: float) -> None:
    sampling = Sampling(temperature=1.3, top_p=top_p, top_k=top_k, min_p=min_p, seed=seed)
    assert 0 <= sample(row(seed), sampling, seed) < 200


def test_wide_nuclei_are_found_past_the_first_cut() -> None:
    logits = np.zeros(5000, np.float32)
    counts = draws(logits, Sampling(top_p=0.5), 3000)
    assert counts[:2500].sum() == 3000


def test_repetition_counts_prompt_and_output() -> None:
    logits = np.array([3.0, 2.9, 2.8, -1.0], np.float32)
    sampling = dataclasses.replace(GREEDY, repetition_penalty=1.5)
    assert sample(logits, sampling, 2, penalties(sampling, [0], [1], 4)) == 2
    negative = np.array([-1.0, -1.2], np.float32)
    assert sample(negative, sampling, 1, penalties(sampling, [0], [], 2)) == 1


def test_presence_and_frequency_count_the_output_alone() -> None:
    logits = np.array([3.0, 2.0, 1.0], np.float32)
    presence = dataclasses.replace(GREEDY, presence_penalty=1.5)
    assert sample(logits, presence, 1, penalties(presence, [0, 0], [], 3)) == 0
    assert sample(logits, presence, 2, penalties(presence, [2], [0], 3)) == 1
    frequency = dataclasses.replace(GREEDY, frequency_penalty=0.6)
    assert sample(logits, frequency, 2, penalties(frequency, [2], [0], 3)) == 0
    assert sample(logits, frequency, 3, penalties(frequency, [2], [0, 0], 3)) == 1


@given(st.lists(st.integers(0, 19), min_size=2, max_size=40), st.integers(1, 39), st.integers(0, 39))
def test_penalties_counted_in_steps_equal_those_counted_at_once(tokens: list[int], prompt: int, cut: int) -> None:
    sampling = Sampling(repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.2)
    prompt = min(prompt, len(tokens))
    whole = penalties(sampling, tokens[:prompt], tokens[prompt:], 20)
    stepwise = Penalties(sampling, prompt)
    for end in sorted({min(cut, len(tokens)), prompt, len(tokens)}):
        stepwise.observe(tokens[:end], 20)
    first, second = np.linspace(-2, 2, 20), np.linspace(-2, 2, 20)
    whole.apply(first)
    stepwise.apply(second)
    assert np.array_equal(first, second)


def test_neutral_parameters_penalise_nothing() -> None:
    assert Penalties.for_sampling(Sequence(bytes(16), [1], 1, [], 0, Sampling())) is None


def test_logprobs_are_the_models_own() -> None:
    logits = row(8, size=30)
    expected = np.log(softmax(logits))
    found = logprobs(logits, 4, 3)
    assert found.logprob == pytest.approx(expected[4])
    assert [token for token, _ in found.top] == np.argsort(-expected)[:3].tolist()
    assert [value for _, value in found.top] == pytest.approx(sorted(expected, reverse=True)[:3])
    assert logprobs(logits, 4, 0).top == ()
