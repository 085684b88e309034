"""What a promise adds to a prediction."""

from __future__ import annotations

import random

import pytest

from router.placement.accuracy import MOST, Accuracy


def test_exact_predictions_need_nothing_added() -> None:
    accuracy = Accuracy()
    assert accuracy.error is None
    for _ in range(20):
        accuracy.observe(0.5, 0.5)
    assert accuracy.factor == pytest.approx(1.0)
    assert accuracy.error == pytest.approx(0.0)


def test_a_promise_is_kept_mostly_and_not_padded_much() -> None:
    rng, accuracy = random.Random(1), Accuracy()
    kept = padded = 0
    for index in range(600):
        achieved = 0.4 * rng.uniform(0.9, 1.5)
        promise = 0.4 * accuracy.factor
        if index >= 100:
            kept += achieved <= 1.2 * promise
            padded += promise > 1.25 * achieved
        accuracy.observe(0.4, achieved)
    assert kept / 500 >= 0.9
    assert padded / 500 < 0.5


def test_one_disaster_does_not_ruin_all_promises() -> None:
    accuracy = Accuracy()
    for _ in range(40):
        accuracy.observe(0.1, 0.1)
    accuracy.observe(0.1, 60.0)
    assert accuracy.factor <= 1.2
    for _ in range(64):
        accuracy.observe(0.1, 60.0)
    assert accuracy.factor == MOST


def test_the_first_prompts_do_not_decide_alone() -> None:
    accuracy = Accuracy()
    accuracy.observe(0.01, 0.06)
    assert accuracy.factor == pytest.approx(1.2)
    for _ in range(20):
        accuracy.observe(0.1, 0.2)
    assert accuracy.factor == pytest.approx(2.0), "twenty agree"


def test_what_can_not_be_compared_is_left_out() -> None:
    accuracy = Accuracy()
    accuracy.observe(0.0, 1.0)
    assert accuracy.error is None
