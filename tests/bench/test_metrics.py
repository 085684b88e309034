"""Figures computed by hand against those of the code."""

from __future__ import annotations

import math

import pytest

from baton.bench.figures.metrics import by_class, distribution, summarize
from baton.bench.figures.series import bursts_in, series_of
from baton.bench.schedule.classes import TrafficClass
from baton.client.types import SloOutcome
from tests.bench.builders import TTFT_ONLY, accepted, finished, record

BOTH = TrafficClass("both", ttft_ms=100.0, tpot_ms=20.0)


def test_latencies_count_from_when_the_request_was_due() -> None:
    late = record(1.0, [1.5, 1.6, 1.8], sent_s=1.4)
    assert late.late_ms == pytest.approx(400)
    assert late.ttft_ms == pytest.approx(500)
    assert late.tpot_ms == pytest.approx(150)
    assert late.gaps_ms == pytest.approx([100, 200])
    assert late.total_ms == pytest.approx(800)


def test_several_tokens_in_one_event_are_one_gap_and_all_count() -> None:
    merged = record(0.0, [0.1, 0.4])
    merged.counts = [1, 3]
    assert merged.output_tokens == 4
    assert merged.tpot_ms == pytest.approx(100)
    assert merged.gaps_ms == pytest.approx([300])
    assert summarize([merged], 1.0).tokens_per_event == 2.0


def test_a_single_token_has_no_tpot_and_keeps_that_objective() -> None:
    single = record(0.0, [0.05], traffic=BOTH)
    assert single.tpot_ms is None
    assert single.kept


def test_kept_means_both_objectives_and_a_good_end() -> None:
    good = record(0.0, [0.09, 0.105], traffic=BOTH)
    slow_start = record(0.0, [0.11, 0.12], traffic=BOTH)
    slow_tokens = record(0.0, [0.09, 0.12], traffic=BOTH)
    broken = record(0.0, [0.09, 0.105], traffic=BOTH, status="UNAVAILABLE", accepted=accepted())
    refused = record(0.0, end_s=0.004, traffic=BOTH, status="RESOURCE_EXHAUSTED", constraint="ttft")
    found = summarize([good, slow_start, slow_tokens, broken, refused], window_s=2.0)
    assert found.attainment == pytest.approx(1 / 5)
    assert found.attainment_admitted == pytest.approx(1 / 4)
    assert found.ttft_attainment == pytest.approx(2 / 5)
    assert found.tpot_attainment == pytest.approx(2 / 5)
    assert (found.goodput, found.rate) == (0.5, 2.5)
    assert found.statuses == {"OK": 3, "UNAVAILABLE": 1, "RESOURCE_EXHAUSTED": 1}
    assert found.refusals.count == 1
    assert found.refusals.constraints == {"ttft": 1}
    assert found.refusals.answer_ms is not None
    assert found.refusals.answer_ms.p50 == pytest.approx(4.0)


def test_without_objectives_every_good_end_is_kept() -> None:
    found = summarize([record(0.0, [9.0]), record(0.0, status="INTERNAL")], 1.0)
    assert (found.attainment, found.ttft_attainment) == (0.5, None)


def test_running_out_of_room_after_admission_is_no_refusal() -> None:
    broken = record(0.0, [0.1], status="RESOURCE_EXHAUSTED", accepted=accepted())
    assert summarize([broken], 1.0).refusals.count == 0


def test_percentiles_interpolate() -> None:
    found = distribution([float(value) for value in range(1, 102)])
    assert found is not None
    assert (found.p50, found.p90, found.p95, found.p99) == (51, 91, 96, 100)
    assert (found.count, found.mean, found.min, found.max) == (101, 51, 1, 101)
    assert distribution([]) is None


def test_throughput_counts_to_the_last_event() -> None:
    found = summarize([record(2.0, [3.0, 4.0, 6.0], finished=finished(cached=25))], window_s=2.0, begin_s=1.0)
    assert found.output_tokens_per_s == pytest.approx(3 / 5)
    assert found.prompt_tokens_per_s == pytest.approx(100 / 5)
    assert found.cached_prompt_share == 0.25


def test_promises_against_what_was_achieved() -> None:
    promised = (50.0, 100.0, 100.0, 200.0)
    achieved = (0.050, 0.119, 0.121, 0.100)
    pairs = zip(promised, achieved, strict=True)
    found = summarize([record(0.0, [got], accepted=accepted(said)) for said, got in pairs], 1.0)
    assert found.ttft_promise is not None
    assert (found.ttft_promise.count, found.ttft_promise.kept_share) == (4, 0.75)
    assert found.ttft_promise.promised_over_achieved_p50 == pytest.approx((1 + 100 / 119) / 2)
    assert found.ttft_promise.error_p50 == pytest.approx((0.19 + 0.21) / 2)
    assert found.tpot_promise is None, "nothing was promised"


def test_a_promise_of_a_first_token_that_never_came_is_broken() -> None:
    good = record(0.0, [0.05, 0.06], accepted=accepted(50.0, 10.0))
    silent = record(0.0, end_s=120.0, status="DEADLINE_EXCEEDED", accepted=accepted(50.0, 10.0))
    single = record(0.0, [0.05], accepted=accepted(50.0, 10.0))
    found = summarize([good, silent, single], 1.0)
    assert found.ttft_promise is not None
    assert found.tpot_promise is not None
    assert (found.ttft_promise.count, found.ttft_promise.kept_share) == pytest.approx((3, 2 / 3))
    assert (found.tpot_promise.count, found.tpot_promise.kept_share) == (2, 0.5), "one token has no time per token"


def test_the_silence_before_a_bad_end_was_waited_for() -> None:
    stalled = record(0.0, [0.05, 0.06], end_s=120.0, status="DEADLINE_EXCEEDED")
    assert stalled.gaps_ms == pytest.approx([10.0, 119_940.0])
    found = summarize([stalled], 1.0)
    assert found.itl_ms is not None
    assert found.itl_ms.max == pytest.approx(119_940.0)
    assert max(most for most in series_of([stalled], 1.0).itl_max_ms if most is not None) == pytest.approx(119_940.0)
    assert record(0.0, end_s=120.0, status="DEADLINE_EXCEEDED").gaps_ms == []


def test_the_cross_check_counts_from_sending_and_finds_disagreement() -> None:
    kept = SloOutcome(True, None)
    fine = record(0.0, [0.052, 0.062], sent_s=0.001, finished=finished(50.0, 10.0, kept), traffic=TTFT_ONLY)
    odd = record(0.0, [0.152, 0.162], finished=finished(150.0, 10.0, kept), traffic=TTFT_ONLY)
    check = summarize([fine, odd], 1.0).cross_check
    assert check.ttft_difference_ms is not None
    assert check.tpot_difference_ms is not None
    assert (check.ttft_difference_ms.min, check.ttft_difference_ms.max) == pytest.approx((1.0, 2.0))
    assert check.tpot_difference_ms.max == pytest.approx(0.0, abs=1e-9)
    assert check.disagreements == 1


def test_classes_are_summed_up_apart() -> None:
    found = by_class([record(0.0, [0.05], traffic=BOTH), record(0.0, [0.5], traffic=TTFT_ONLY)], 1.0)
    assert list(found) == ["all", "both"]
    assert (found["all"].attainment, found["both"].attainment) == (0.0, 1.0)


def test_bursts_are_the_bins_far_above_the_mean() -> None:
    arrivals = [1, 0, 9, 8, 1, 0, 8, 1]
    assert bursts_in(arrivals, 0.5, 4.0) == ((1.0, 2.0), (3.0, 3.5))
    assert bursts_in([1] * 8, 0.5, 4.0) == ()


def test_the_series_puts_gaps_where_they_ended() -> None:
    records = [record(0.0, [0.1, 0.2, 9.2]), record(5.0, [9.7, 9.9], traffic=TTFT_ONLY)]
    series = series_of(records, end_s=10.0)
    width = series.at_s[1] - series.at_s[0]
    seen = {round(at_s / width - 0.5) * width: most for at_s, most in zip(series.at_s, series.itl_max_ms, strict=True)}
    worst = max((most, at_s) for at_s, most in seen.items() if most is not None)
    assert worst[0] == pytest.approx(9000)
    assert worst[1] <= 9.2 < worst[1] + width
    assert sum(series.arrivals) * width == pytest.approx(2)
    assert sum(series.kept) * width == pytest.approx(1)
    assert all(most is None or not math.isnan(most) for most in series.itl_max_ms)
