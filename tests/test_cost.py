"""The cost model against processes whose true coefficients are known."""

from __future__ import annotations

import random

import pytest

from baton.cost import COEFFICIENTS, MIXED_MOST, CostModel, StepCost, StepShape, pairs

TRUE = StepCost(2e-3, 9e-4, 4e-7, 5e-3, 1e-3, 2e-6)


def chunk(rng: random.Random) -> StepShape:
    new, cached = rng.choice((16, 64, 200, 512)), rng.choice((0, 256, 1024))
    return StepShape(new, pairs(new, cached))


def step(rng: random.Random) -> StepShape:
    sequences = rng.randint(1, 16)
    return StepShape(0, 0.0, sequences, sequences * rng.randint(20, 1000))


def close(found: StepCost, expected: StepCost, within: float) -> None:
    rng = random.Random(1)
    for shape in [chunk(rng) for _ in range(20)] + [step(rng) for _ in range(20)]:
        assert found.seconds(shape) == pytest.approx(expected.seconds(shape), rel=within)


def test_it_learns_the_true_cost_from_a_few_noisy_steps() -> None:
    rng, model = random.Random(2), CostModel()
    for _ in range(30):
        for shape in (chunk(rng), step(rng)):
            model.observe(shape, TRUE.seconds(shape) * rng.uniform(0.97, 1.03))
    close(model.cost, TRUE, 0.06)


def test_outliers_hardly_move_it() -> None:
    rng, model = random.Random(3), CostModel()
    for index in range(200):
        for shape in (chunk(rng), step(rng)):
            model.observe(shape, TRUE.seconds(shape) * (10 if index % 20 == 19 else rng.uniform(0.97, 1.03)))
    close(model.cost, TRUE, 0.25)


def test_it_follows_a_change() -> None:
    rng, model = random.Random(4), CostModel()
    slower = StepCost(*(1.5 * getattr(TRUE, name) for name in COEFFICIENTS))
    for truth in (TRUE, slower):
        for _ in range(400):
            for shape in (chunk(rng), step(rng)):
                model.observe(shape, truth.seconds(shape))
    close(model.cost, slower, 0.05)


@pytest.mark.parametrize("seed", range(20))
def test_prompts_of_one_length_say_nothing_of_others(seed: int) -> None:
    """Their differences are noise, and its slope is no cost of a token."""
    rng = random.Random(seed)
    shapes = [StepShape(count, pairs(count, 0)) for count in (16, 64, 256, 512)]
    model = CostModel((shape, TRUE.seconds(shape) * rng.uniform(0.95, 1.05)) for shape in shapes)
    for _ in range(rng.choice([3, 5, 10, 40])):
        count = rng.randint(46, 50)
        shape = StepShape(count, pairs(count, 0))
        model.observe(shape, TRUE.seconds(shape) * rng.choice([1.0, 1.05, 1.1, 1.2, 1.8]))
    assert 0.75 < model.cost.prefill(300, 0, 512) / TRUE.prefill(300, 0, 512) < 1.5


def test_what_steps_with_both_take_over_their_parts_is_learned() -> None:
    rng, model = random.Random(6), CostModel()
    both = StepShape(64, pairs(64, 0), 8, 4000)
    for slower in (1.0, 1.3, 0.9):
        for _ in range(100):
            for shape in (chunk(rng), step(rng)):
                model.observe(shape, TRUE.seconds(shape))
            model.observe(both, slower * TRUE.seconds(both) * rng.uniform(0.95, 1.05))
        assert model.cost.mixed == pytest.approx(slower, rel=0.05)
        assert model.cost.seconds(both) == pytest.approx(slower * TRUE.seconds(both), rel=0.1)
    for _ in range(50):
        model.observe(both, 1e3)
    assert model.cost.mixed <= MIXED_MOST


def test_one_load_for_long_does_not_unlearn_the_others() -> None:
    rng = random.Random(5)
    measured = [(shape, TRUE.seconds(shape)) for _ in range(6) for shape in (chunk(rng), step(rng))]
    model = CostModel(measured)
    always = StepShape(0, 0.0, 8, 4000)
    for _ in range(5000):
        model.observe(always, TRUE.seconds(always))
    assert model.cost.seconds(always) == pytest.approx(TRUE.seconds(always), rel=0.01)
    close(model.cost, TRUE, 0.25)


def test_a_prompt_is_the_sum_of_its_chunks() -> None:
    whole = TRUE.prefill(1000, 24, 512)
    parts = TRUE.seconds(StepShape(512, pairs(512, 24))) + TRUE.seconds(StepShape(488, pairs(488, 536)))
    assert whole == pytest.approx(parts)


@pytest.mark.parametrize("cached", [0, 1000])
def test_a_chunk_that_fits_does_not_exceed_the_time(cached: int) -> None:
    count = TRUE.fits(0.1, cached, 512)
    assert 0 < count < 512
    idle = TRUE.decode(4, 100)
    assert TRUE.seconds(StepShape(count, pairs(count, cached), 4, 100)) - idle <= 0.1
    assert TRUE.seconds(StepShape(count + 1, pairs(count + 1, cached), 4, 100)) - idle > 0.1
    assert TRUE.fits(0.0, cached, 512) == 0
    assert TRUE.fits(100.0, cached, 512) == 512


def test_nothing_observed_means_nothing_known() -> None:
    cost = CostModel().cost
    assert not cost.knows_prefill
    assert not cost.knows_decode
