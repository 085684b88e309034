"""What the serving benchmarks compute from their runs."""

from __future__ import annotations

import pytest

from benchmarks.report import spread
from benchmarks.serving.burst import round_of
from benchmarks.serving.goodput import Goodput, compared, measurable, rate_at, rows_of
from benchmarks.serving.idle import Idle


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
    found = rate_at({1: 1.0, 2: 0.95, 3: 0.85, 4: 0.99})
    assert found.rate == pytest.approx(2.5)
    assert found.bound == ""


def test_what_an_idle_system_computes_in_time_follows_the_prompts_that_were_measured() -> None:
    assert Idle({100: 50.0, 400: 200.0}, 10.0).longest_within(100.0) == pytest.approx(200), "in proportion"
    assert Idle({100: 50.0, 400: 800.0}, 10.0).longest_within(200.0) == pytest.approx(200), "with the square"
    with_fixed_part = Idle({100: 50.0, 200: 70.0, 400: 140.0}, 10.0)
    assert 100 < with_fixed_part.longest_within(60.0) < 200
    assert with_fixed_part.longest_within(100.0) == pytest.approx(200 * 10 / 7)
    assert with_fixed_part.longest_within(280.0) == pytest.approx(800), "past the last, as up to there"
    with pytest.raises(RuntimeError, match="something else ran"):
        Idle({100: 50.0, 400: 50.0}, 10.0).longest_within(60.0)


def test_what_lies_outside_of_the_rates_that_were_tried_is_a_bound() -> None:
    assert rate_at({1: 0.8, 2: 0.5}) == Goodput(1, "at most")
    assert rate_at({1: 1.0, 2: 0.9}) == Goodput(2, "at least")


@pytest.mark.parametrize(
    ("ours", "theirs", "reached"),
    [
        (Goodput(2.0), Goodput(2.0), True),
        (Goodput(1.8), Goodput(2.0), False),
        (Goodput(2.0, "at least"), Goodput(2.0, "at least"), None),
        (Goodput(2.0, "at least"), Goodput(2.0), True),
        (Goodput(1.5, "at least"), Goodput(2.0), None),
        (Goodput(1.5), Goodput(2.0, "at least"), False),
        (Goodput(1.0, "at most"), Goodput(1.0, "at most"), None),
        (Goodput(1.0, "at most"), Goodput(3.0), False),
    ],
)
def test_a_bound_decides_only_what_it_can(ours: Goodput, theirs: Goodput, reached: bool | None) -> None:
    assert ours.reaches(0.95, theirs) is reached


def test_nothing_is_said_of_rates_that_the_client_could_not_send() -> None:
    """Of no mode, and the figures of the rates below stand."""
    windows: dict[tuple[str, float], list[float | None]] = {
        ("adaptive", 1.0): [0.99, 0.98],
        ("adaptive", 2.0): [0.95, 0.94],
        ("adaptive", 3.0): [0.5, 0.5],
        ("colocated", 1.0): [0.97, 0.97],
        ("colocated", 2.0): [0.85, 0.86],
        ("colocated", 3.0): [None, 0.4],
    }
    found = measurable(windows)
    assert sorted(found) == [(name, rate) for name in ("adaptive", "colocated") for rate in (1.0, 2.0)]
    ours, theirs, *rest = rows_of("tpot", windows)
    assert ours.ours == 2.0
    assert "at least" in ours.case
    assert 1.0 < theirs.ours < 2.0
    assert not any("3/s" in row.case for row in rest)
    with pytest.raises(RuntimeError, match="lower rates"):
        measurable({("adaptive", 1.0): [None]})


def test_the_quartiles_of_two_runs_lie_between_them() -> None:
    assert spread([1.12, 1.48]) == "1.12 [1.21 1.39] 1.48"


def test_modes_are_compared_window_by_window() -> None:
    """A bad minute costs both the same: the difference knows nothing of it."""
    found = {
        ("adaptive", 1.0): [0.90, 0.50], ("adaptive", 2.0): [0.80, 0.70],
        ("colocated", 1.0): [0.88, 0.48], ("colocated", 2.0): [0.78, 0.70],
    }  # fmt: skip
    (row,) = compared(found, [1.0, 2.0])
    assert row.ours == pytest.approx(1.5)
    assert row.case == "adaptive less colocated, mean of 4 windows, standard error 0.5"


def test_a_single_window_is_not_compared() -> None:
    assert compared({("adaptive", 1.0): [0.9], ("colocated", 1.0): [0.8]}, [1.0]) == []
