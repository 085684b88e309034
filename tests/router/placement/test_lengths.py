"""The likely length of an output, where many are cut off before they end."""

from __future__ import annotations

import random
from fractions import Fraction

import pytest

from router.placement.lengths import ENOUGH, PRIOR_TOKENS, WINDOW, OutputLengths


def learned(*seen: tuple[int, bool]) -> OutputLengths:
    lengths = OutputLengths()
    for tokens, complete in seen:
        lengths.observe(tokens, complete=complete)
    return lengths


def test_before_enough_have_ended_a_prior_stands_in() -> None:
    lengths = learned(*[(5, True)] * (ENOUGH - 1))
    assert (lengths.likely(10_000), lengths.likely(100)) == (PRIOR_TOKENS, 100)
    lengths.observe(5, complete=True)
    assert lengths.likely(10_000) == 5


def test_nine_in_ten_become_no_longer() -> None:
    lengths = learned(*((tokens, True) for tokens in range(1, 101)))
    assert lengths.likely(10_000) == 90
    assert lengths.likely(40) == 40


def test_short_limits_say_nothing_of_those_without() -> None:
    """Nineteen in twenty are cut off at 16 tokens; the others become 1,000 long."""
    lengths = learned(*[(16, False)] * 190, *[(1000, True)] * 10)
    assert (lengths.likely(16), lengths.likely(8192)) == (16, 1000)


@pytest.mark.parametrize(("cut_off_at", "likely"), [(16, PRIOR_TOKENS), (3000, 3000)])
def test_where_none_ends_by_itself_they_are_at_least_as_long_as_was_seen(cut_off_at: int, likely: int) -> None:
    assert learned(*[(cut_off_at, False)] * 50).likely(8192) == likely


def test_old_ones_are_forgotten() -> None:
    assert learned(*[(4000, True)] * WINDOW, *[(10, True)] * WINDOW).likely(8192) == 10


@pytest.mark.parametrize("seed", range(20))
def test_it_is_the_product_limit_estimate(seed: int) -> None:
    """By its definition, in fractions, with another way to count: over distinct lengths."""
    dice = random.Random(seed)
    seen = [(dice.randint(1, 60), dice.random() < 0.6) for _ in range(WINDOW)]
    longer, expected = Fraction(1), None
    for length in sorted({tokens for tokens, _ in seen}):
        at_risk = sum(tokens >= length for tokens, _ in seen)
        longer *= 1 - Fraction(seen.count((length, True)), at_risk)
        if longer <= Fraction(1, 10):
            expected = length
            break
    if expected is None:
        expected = max(PRIOR_TOKENS, *(tokens for tokens, _ in seen))
    assert learned(*seen).likely(100_000) == expected
