"""What the serving benchmarks compute from their runs."""

from __future__ import annotations

import pytest

from tests.bench.burst import round_of
from tests.bench.goodput import rate_at


def test_only_gaps_between_the_bursts_arrival_and_its_last_first_token_count() -> None:
    calm = [(0.01 * index, 0.010) for index in range(-50, 400)]
    burst = [(at, 0.030 if at <= 0.0 or at > 2.0 else 0.012) for at, _ in calm]
    found = round_of(calm, burst, firsts=[0.5, 2.0, 1.0])
    assert (found.calm_p99, found.burst_p99, found.burst_max) == pytest.approx((10, 12, 12))
    assert found.ratio == pytest.approx(1.2)
    assert found.ttft == pytest.approx((500, 2000, 1000))


def test_streams_that_end_before_the_burst_are_no_measurement() -> None:
    short = [(0.01 * index, 0.010) for index in range(50)]
    with pytest.raises(RuntimeError, match="ended before"):
        round_of(short, short, [2.0])


def test_the_rate_is_where_the_attainment_crosses_ninety_percent() -> None:
    assert rate_at({1: 1.0, 2: 0.95, 3: 0.85, 4: 0.99}) == pytest.approx(2.5)
    assert rate_at({1: 0.8, 2: 0.5}) == pytest.approx(0.5)
    assert rate_at({1: 1.0, 2: 0.9}) == 2
