"""Sweeps, comparisons and verdicts: what is concluded from figures."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from baton.bench.figures.compare import compare, differences
from baton.bench.figures.metrics import summarize
from baton.bench.figures.results import document, measure, read_json, write_csv, write_json
from baton.bench.figures.verdict import Verdict, health_of, judge
from baton.bench.sending.probe import ClientLoad, Probe
from baton.bench.sending.records import Record
from baton.bench.sweep import MOST_POINTS, Point, best, next_rate, shortfall
from baton.errors import ConfigError
from tests.bench.builders import TTFT_ONLY, client_load, config, finished, record, run_of


def search(attained: Callable[[float], float], start: float = 1.0, tolerance: float = 0.05) -> list[Point]:
    points: list[Point] = []
    while (rate := next_rate(points, start, 0.9, tolerance)) is not None:
        points.append(Point(rate, attained(rate), rate * attained(rate)))
    return points


@pytest.mark.parametrize("capacity", [0.03, 0.9, 1.0, 7.3, 400.0])
def test_a_sweep_finds_the_highest_rate(capacity: float) -> None:
    points = search(lambda rate: 1.0 if rate <= capacity else 0.5)
    found = best(points, 0.9)
    assert found is not None
    assert found.rate <= capacity <= found.rate * 1.06
    assert len(points) <= MOST_POINTS
    assert shortfall(points, 0.9, 0.05) == ""


def test_a_sweep_over_what_can_never_be_kept_ends_without_a_rate() -> None:
    points = search(lambda rate: 0.1)
    assert best(points, 0.9) is None
    assert len(points) <= MOST_POINTS


def test_a_lucky_run_above_a_failed_one_does_not_count() -> None:
    points = [Point(1, 1.0, 1), Point(4, 0.95, 4), Point(2, 0.5, 1)]
    assert best(points, 0.9) == points[0]
    assert next_rate(points, 1.0, 0.9, 0.05) == 1.5


def test_a_sweep_ends_where_the_client_is_the_bottleneck() -> None:
    points = [Point(1, 1.0, 1), Point(2, 1.0, 2, valid=False)]
    assert next_rate(points, 1.0, 0.9, 0.05) is None
    assert best(points, 0.9) == points[0]
    assert (
        shortfall(points, 0.9, 0.05) == "the highest rate is at least 1 requests/s: at 2 the client was the bottleneck"
    )
    points[1] = replace(points[1], attainment=0.3)
    assert "at least 1 requests/s: at 2 the client" in shortfall(points, 0.9, 0.05), "that says nothing of the server"


def test_a_sweep_that_runs_out_of_tries_says_how_far_it_came() -> None:
    points = search(lambda rate: 1.0 if rate <= 20_000 else 0.5)
    assert len(points) == MOST_POINTS
    assert (
        shortfall(points, 0.9, 0.05)
        == "the highest rate is at least 1.638e+04 requests/s, less than 3.277e+04: the search ended after 16 rates"
    )
    assert shortfall(search(lambda rate: 0.1), 0.9, 0.05).startswith("no rate that was tried reached 90%")


def verdict(records: list[Record], *, client: ClientLoad | None = None, **settings: object) -> Verdict:
    run = run_of(records, client=client)
    return judge(run, health_of(run), summarize(records, 10.0).cross_check, config(**settings))


GOOD = [record(0.0, [0.051, 0.061])]


def test_a_client_that_kept_up_is_valid_without_a_word() -> None:
    assert verdict(GOOD) == Verdict(True, ())


def test_sending_late_is_told_and_past_the_bound_invalid() -> None:
    late = [record(1.0, [1.06, 1.07], sent_s=1.008)]
    told = verdict(late)
    assert told.valid
    assert "sent more than 8.0 ms late" in told.warnings[0]
    judged = verdict(late, max_late_ms=6.0)
    assert not judged.valid
    assert judged.warnings[0].startswith("INVALID")


def test_a_lagging_or_full_loop_makes_a_run_invalid() -> None:
    assert not verdict(GOOD, client=client_load([90.0], [0.2])).valid
    assert not verdict(GOOD, client=client_load([0.1], [0.99, 0.97])).valid
    one_second = verdict(GOOD, client=client_load([0.1], [0.2, 0.9]))
    assert one_second.valid
    assert "90% of a core" in one_second.warnings[0]


def test_a_full_core_makes_a_run_invalid_whoever_filled_it() -> None:
    """gRPC's own threads take more than the loop's: with one core the loop never gets to 95 % of it."""
    full = verdict(GOOD, client=client_load([0.1], [0.47] * 5, process=0.99, cores=1))
    assert not full.valid
    assert "99% of its core" in full.warnings[1]
    assert verdict(GOOD, client=client_load([0.1], [0.47] * 5, process=0.99, cores=2)).valid


def test_only_the_time_in_which_requests_are_due_counts_for_how_busy_the_client_is() -> None:
    """Ten seconds at the limit, and then answers that end for another minute."""
    client = client_load([0.1], [0.99] * 10 + [0.02] * 60)
    assert not verdict(GOOD, client=client).valid


class StandingStill:
    """In place of `time` and `asyncio` for a probe: a loop whose `still`-th timer comes so many seconds too late."""

    def __init__(self, still: int, seconds: float, timers: int) -> None:
        self._now, self._timers = 100.0, iter([0.0] * (still - 1) + [seconds] + [0.0] * (timers - still))

    def perf_counter(self) -> float:
        return self._now

    thread_time = process_time = perf_counter

    async def sleep(self, seconds: float) -> None:
        """Cancelled after the last timer."""
        late = next(self._timers, None)
        if late is None:
            raise asyncio.CancelledError
        self._now += seconds + late


async def test_a_loop_that_stood_still_was_late_for_every_timer_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fifth of the time, in one piece: the 99th percentile has to show it."""
    loop = StandingStill(still=40, seconds=0.2, timers=45)
    for module in ("time", "asyncio"):
        monkeypatch.setattr(f"baton.bench.sending.probe.{module}", loop)
    made = Probe()
    with pytest.raises(asyncio.CancelledError):
        await made.run()
    lags = sorted(made.load.lags_ms)
    assert lags[-10:] == pytest.approx([20, 40, 60, 80, 100, 120, 140, 160, 180, 200])
    assert lags[:-10] == pytest.approx([0.0] * 45, abs=1e-6)


def test_clocks_that_do_not_agree_are_told() -> None:
    assert "later than the router" in verdict([record(0.0, [0.2], finished=finished(50.0, None))]).warnings[0]
    assert "than the client saw them" in verdict([record(0.0, [0.02], finished=finished(50.0, None))]).warnings[0]


def test_prompts_that_were_cached_already_are_told() -> None:
    """They have nothing in common, unless a trace says which blocks they share."""
    served = record(0.0, [0.051, 0.061], finished=finished(cached=25))
    assert "25% of the prompts' tokens were in a prefix cache" in verdict([served]).warnings[0]
    served.planned = replace(served.planned, blocks=(1,), block_tokens=512)
    assert verdict([served]) == Verdict(True, ())


def test_a_result_is_written_read_and_compared(tmp_path: Path) -> None:
    fast = measure(run_of([record(0.0, [0.05, 0.06], traffic=TTFT_ONLY)] * 4), config(rate=1.0), "here:1", "tiny")
    slow = measure(run_of([record(0.0, [0.10, 0.12], traffic=TTFT_ONLY)] * 4), config(rate=2.0), "here:1", "tiny")
    paths = tmp_path / "a.json", tmp_path / "b.json"
    for found, path in zip((fast, slow), paths, strict=True):
        write_json(found, path)
    a, b = map(read_json, paths)
    assert a == json.loads(json.dumps(document(fast)))
    rows = {row.metric: row for row in compare(a, b)}
    assert rows["ttft_ms p50"].ratio == pytest.approx(2.0)
    assert (rows["ttft_ms p50"].verdict, rows["goodput"].verdict) == ("worse", "same")
    assert {row.verdict for row in compare(b, a) if row.metric.startswith("tpot")} == {"better"}
    assert (rows["refused (share)"].ratio, rows["refused (share)"].verdict) == (None, "same")
    assert differences(a, b) == ["rate: 1.0, 2.0"]


def test_a_comparison_says_what_it_can_of_a_baseline_of_nothing(tmp_path: Path) -> None:
    bad = [record(0.0, [0.5, 0.6], traffic=TTFT_ONLY)] * 4
    good = [record(0.0, [0.05, 0.06], traffic=TTFT_ONLY), *bad[:3]]
    worse = [*good, record(0.0, status="RESOURCE_EXHAUSTED"), record(0.0, status="UNAVAILABLE")]
    none, some, refused = (
        document(measure(run_of(records), config(), "here:1", name))
        for records, name in ((bad, "tiny"), (good, "tiny"), (worse, "huge"))
    )
    rows = {row.metric: row for row in compare(none, some)}
    assert (rows["attainment"].a, rows["attainment"].ratio, rows["attainment"].verdict) == (0.0, None, "better")
    rows = {row.metric: row for row in compare(some, refused)}
    assert rows["refused (share)"].b == pytest.approx(1 / 6)
    assert rows["refused (share)"].verdict == "worse"
    assert rows["failed (share)"].b == pytest.approx(1 / 6)
    assert rows["failed (share)"].verdict == "worse"
    assert differences(some, refused) == ["model: tiny, huge"]


def test_what_is_no_result_is_refused(tmp_path: Path) -> None:
    for content, told in (
        (None, "can't read"),
        ("{", "not JSON"),
        ("[]", "not a result"),
        ("{}", "not a result"),
        ('{"baton_bench": 1, "model": "tiny"}', "lacks address, at"),
    ):
        path = tmp_path / "x.json"
        if content is not None:
            path.write_text(content)
        with pytest.raises(ConfigError, match=f"^compare: .*{told}"):
            read_json(path)


def test_the_csv_has_a_row_per_request(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    write_csv([record(1.0, [1.05, 1.06], traffic=TTFT_ONLY), record(2.0, status="UNAVAILABLE", message="gone")], path)
    header, good, bad = (line.split(",") for line in path.read_text().splitlines())
    first, second = dict(zip(header, good, strict=True)), dict(zip(header, bad, strict=True))
    assert (first["ttft_ms"], first["ttft_kept"], first["status"], first["path"]) == (
        "50.000", "yes", "OK", "disaggregated",
    )  # fmt: skip
    assert (second["ttft_ms"], second["ttft_kept"], second["message"]) == ("", "", "gone")
