"""A run over time, in equal bins, for the plots, and its bursts of arrivals."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from baton.bench.sending.records import Record

BINS = 60
LEAST_BIN_S = 0.25
BURST_SIGMAS = 2.0


@dataclass(frozen=True, slots=True)
class Series:
    """`at_s` has the middle of each bin. Rates are per second; ITL is of the gaps that end in the bin, None without."""

    at_s: tuple[float, ...]
    arrivals: tuple[float, ...]
    kept: tuple[float, ...]
    itl_p50_ms: tuple[float | None, ...]
    itl_p99_ms: tuple[float | None, ...]
    itl_max_ms: tuple[float | None, ...]
    bursts: tuple[tuple[float, float], ...]


def series_of(records: Sequence[Record], end_s: float) -> Series:
    """From the start of the plan to the last event."""
    last_s = max([end_s, *(record.end_s for record in records)])
    width = max(LEAST_BIN_S, last_s / BINS)
    count = math.floor(last_s / width) + 1  # puts the last event inside the last bin
    edges = np.arange(count + 1) * width
    due = np.array([record.planned.at_s for record in records])
    arrivals, _ = np.histogram(due, edges)
    kept, _ = np.histogram([record.planned.at_s for record in records if record.kept], edges)
    gaps = _gaps(records, edges)
    return Series(
        tuple(float(edge) for edge in edges[:-1] + width / 2),
        tuple(float(value) for value in arrivals / width),
        tuple(float(value) for value in kept / width),
        _figures(gaps, lambda found: np.percentile(found, 50)),
        _figures(gaps, lambda found: np.percentile(found, 99)),
        _figures(gaps, np.max),
        bursts_in(arrivals.tolist(), width, end_s),
    )


def bursts_in(arrivals: Sequence[int], width: float, end_s: float) -> tuple[tuple[float, float], ...]:
    """Spans of bins with more arrivals than the mean plus two standard deviations of a Poisson process."""
    mean = sum(arrivals) * width / end_s
    bound = max(1.0, mean + BURST_SIGMAS * math.sqrt(mean))
    spans: list[tuple[float, float]] = []
    for index, count in enumerate(arrivals):
        if count <= bound:
            continue
        begin, end = index * width, (index + 1) * width
        if spans and math.isclose(spans[-1][1], begin):
            spans[-1] = spans[-1][0], end
        else:
            spans.append((begin, end))
    return tuple(spans)


def _gaps(records: Sequence[Record], edges: np.ndarray) -> list[np.ndarray]:
    """The gaps between tokens that ended in each bin."""
    ends = np.array([moment for record in records for moment in record.heard_s[1:]])
    gaps = np.array([gap for record in records for gap in record.gaps_ms])
    order = np.argsort(ends, kind="stable")
    ends, gaps = ends[order], gaps[order]
    return [gaps[first:after] for first, after in zip(*np.searchsorted(ends, [edges[:-1], edges[1:]]), strict=True)]


def _figures(gaps: list[np.ndarray], of: Callable[[np.ndarray], float]) -> tuple[float | None, ...]:
    return tuple(float(of(found)) if len(found) else None for found in gaps)
