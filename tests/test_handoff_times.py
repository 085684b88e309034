"""What the next handoff is expected to take."""

from __future__ import annotations

import pytest

from baton.cost import HANDOFF_S, HANDOFF_WINDOW, HandoffTimes


def after(*seconds: float) -> float:
    """What is expected then."""
    times = HandoffTimes()
    for each in seconds:
        times.observe(each)
    return times.expected_s


def test_the_first_one_connects_and_says_nothing() -> None:
    assert after() == after(0.8) == HANDOFF_S


def test_a_slow_way_is_known_by_the_second() -> None:
    assert after(0.060, 0.050) == 0.050


def test_a_fast_one_only_after_a_while() -> None:
    """No promise hangs on too much being expected."""
    assert after(*[0.001] * 5) == HANDOFF_S
    assert after(*[0.001] * 20) == 0.001


def test_nine_of_ten_take_no_longer() -> None:
    assert after(*[0.001 * (1 + index % 10) for index in range(200)]) == pytest.approx(0.010, abs=0.0011)


def test_what_is_long_ago_is_forgotten() -> None:
    assert after(*[0.5] * HANDOFF_WINDOW, *[0.002] * HANDOFF_WINDOW) == 0.002


def test_a_sequence_that_is_there_before_its_token_waits_for_nothing() -> None:
    assert after(*[0.0] * HANDOFF_WINDOW) == 0.0
