"""The report's charts, from a measurement and its records."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from baton.bench.figures.metrics import counted
from baton.bench.figures.results import Measurement
from baton.bench.figures.series import Series
from baton.bench.report.svg import Chart, Line
from baton.bench.sending.records import Record
from baton.bench.sweep import Point

SHARES = np.concatenate([np.linspace(0, 0.9, 91), np.linspace(0.91, 1.0, 46)])


def charts_of(found: Measurement, records: Sequence[Record]) -> list[Chart]:
    chosen, series = counted(records, found.config.warmup_s), found.series
    itl = {"p50": series.itl_p50_ms, "p99": series.itl_p99_ms, "max": series.itl_max_ms}
    traffic = {"due": series.arrivals, "of these, kept their objectives": series.kept}
    point = Point(found.summary.rate, found.summary.attainment, found.summary.goodput, found.verdict.valid)
    charts = [
        _cdf("Time to first token", "% of all requests", chosen, _first_tokens, _marks(found, "ttft_ms")),
        _cdf("Time per output token", "% at most", chosen, _mean_gaps, _marks(found, "tpot_ms")),
        _cdf("Inter-token latency", "% at most", chosen, lambda record: record.gaps_ms, ()),
        _over_time(series, "Inter-token latency over time", "milliseconds", itl),
        _over_time(series, "Requests over time, by when they were due", "requests / s", traffic),
        _over_rate(found.sweep or (point,)),
    ]
    return [*charts, _attained(found.sweep, found.search.attainment)] if found.search else charts


def _first_tokens(record: Record) -> list[float]:
    """Infinite without a first token: the class's curve ends below 100 %."""
    return [math.inf if record.ttft_ms is None else record.ttft_ms]


def _mean_gaps(record: Record) -> list[float]:
    return [] if record.tpot_ms is None else [record.tpot_ms]


def _cdf(
    title: str, y_label: str, records: Sequence[Record], of: Callable[[Record], list[float]],
    marks: Sequence[tuple[float, str]],
) -> Chart:  # fmt: skip
    """A cumulative distribution per class, of requests or gaps."""
    names = sorted({record.planned.traffic.name for record in records})
    lines = []
    for name in names:
        values = [value for record in records if record.planned.traffic.name == name for value in of(record)]
        finite = [value for value in values if math.isfinite(value)]
        if finite:
            quantiles, shares = np.quantile(finite, SHARES).tolist(), SHARES * 100 * len(finite) / len(values)
            lines.append(Line(name, list(zip(quantiles, shares.tolist(), strict=True))))
    return Chart(title, "milliseconds (log)", y_label, lines, x_log=True, y_most=100.0, marks=marks)


def _marks(found: Measurement, objective: str) -> list[tuple[float, str]]:
    named = [(traffic.name, getattr(traffic, objective)) for traffic in found.config.traffic_classes()]
    return [(value, f"{name}: objective {value:g} ms") for name, value in named if value is not None]


def _over_time(series: Series, title: str, y_label: str, curves: Mapping[str, Sequence[float | None]]) -> Chart:
    lines = [Line(name, list(zip(series.at_s, curve, strict=True))) for name, curve in curves.items()]
    return Chart(title, "seconds", y_label, lines, bands=series.bursts, band_label="burst of arrivals")


def _over_rate(points: Sequence[Point]) -> Chart:
    known = sorted(points, key=lambda point: point.rate)
    goodput = [(point.rate, point.goodput) for point in known]
    lines = [Line("goodput", goodput, dots=True), Line("all kept", [(0.0, 0.0), (known[-1].rate, known[-1].rate)])]
    if invalid := [(point.rate, point.goodput) for point in known if not point.valid]:
        lines.append(Line("the client was the bottleneck", invalid, dots=True))
    return Chart("Goodput over rate", "requests / s sent", "requests / s that kept all", lines)


def _attained(points: Sequence[Point], wanted: float) -> Chart:
    known = sorted(points, key=lambda point: point.rate)
    line = Line("attainment", [(point.rate, point.attainment * 100) for point in known], dots=True)
    level = [(wanted * 100, f"wanted: {wanted:.0%}")]
    return Chart("Attainment over rate", "requests / s sent", "% kept", [line], y_most=100.0, levels=level)
