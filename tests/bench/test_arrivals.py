"""Schedules: the rate and the burstiness that were asked for, from the seed alone."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.bench.schedule.arrivals import Profile, arrival_times, profile_of
from tests.bench.builders import config


def times(count: int, *, burstiness: float = 1.0, seed: int = 1, **load: object) -> np.ndarray:
    found = arrival_times(profile_of(config(**load)), burstiness, seed)
    return np.fromiter(itertools.islice(found, count), float)


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0, 16.0])
def test_gaps_have_the_mean_and_the_burstiness_that_were_asked_for(burstiness: float) -> None:
    gaps = np.diff(times(40_000, burstiness=burstiness, rate=5.0))
    assert gaps.mean() == pytest.approx(1 / 5.0, rel=0.06)
    assert gaps.var() / gaps.mean() ** 2 == pytest.approx(burstiness, rel=0.15)


def test_burstiness_zero_means_even_gaps() -> None:
    assert np.diff(times(50, burstiness=0.0, rate=4.0)) == pytest.approx(0.25)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.0, 20.0), st.floats(0.01, 1000.0))
def test_the_same_seed_gives_the_same_pattern_at_every_rate(seed: int, burstiness: float, rate: float) -> None:
    slow, fast = (times(50, burstiness=burstiness, seed=seed, rate=r) for r in (rate, 2 * rate))
    assert slow == pytest.approx(2 * fast)
    assert (np.diff(slow) >= 0).all()
    assert (slow == times(50, burstiness=burstiness, seed=seed, rate=rate)).all()


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0, 16.0])
@pytest.mark.parametrize("load", [{"rate": 8.0}, {"rate": 6.0, "arrivals": "onoff", "on_s": 1.0, "off_s": 4.0}])
def test_a_window_has_as_many_requests_as_its_rate_stands_for(burstiness: float, load: dict[str, object]) -> None:
    """Left to chance, the counts of 200 requests with burstiness 4 differ by 14 % from run to run."""
    expected = round(profile_of(config(**load)).expected(30.0))
    for seed in range(5):
        found = np.fromiter(arrival_times(profile_of(config(**load)), burstiness, seed, 30.0), float, 10_000)
        assert (found < 30.0).sum() == expected


@pytest.mark.parametrize(("seconds", "expected"), [(3.0, 300.0), (10.0, 1000.0), (12.0, 1000.0), (20.0, 2500.0)])
def test_what_a_profile_has_one_expect(seconds: float, expected: float) -> None:
    profile = profile_of(config(arrivals="steps", steps="100:10,0:5,300:10"))
    assert profile.expected(seconds) == pytest.approx(expected)


def test_another_seed_gives_another_pattern() -> None:
    assert (times(20, seed=1) != times(20, seed=2)).all()


def test_on_off_keeps_the_mean_rate_and_is_silent_in_between() -> None:
    found = times(4000, rate=6.0, arrivals="onoff", on_s=1.0, off_s=4.0)
    assert len(found) / found[-1] == pytest.approx(6.0, rel=0.1)
    assert (found % 5.0 < 1.0).all()


def test_steps_have_each_its_rate_and_then_end() -> None:
    profile = profile_of(config(arrivals="steps", steps="100:10,0:5,300:10"))
    found = np.fromiter(arrival_times(profile, 1.0, 3), float)
    counts = [((begin <= found) & (found < end)).sum() for begin, end in ((0, 10), (10, 15), (15, 25))]
    assert counts == [pytest.approx(1000, rel=0.15), 0, pytest.approx(3000, rel=0.1)]
    assert profile.seconds == 25
    assert found[-1] < 25


def test_a_gap_goes_on_through_a_pause() -> None:
    """An even process of one per second, with 3 s taken out after the first 1.5 s."""
    found = itertools.islice(arrival_times(Profile(((1.5, 1.0), (3.0, 0.0), (9.0, 1.0))), 0.0, 0), 3)
    assert list(found) == pytest.approx([1.0, 5.0, 6.0])
