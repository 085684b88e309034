"""Searches the highest rate at which enough requests keep their objectives, by doubling, then bisecting."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MOST_POINTS = 16
LEAST_RATE = 1e-3


@dataclass(frozen=True, slots=True)
class Point:
    """A run of a sweep. `valid` is False if the client was the bottleneck."""

    rate: float
    attainment: float
    goodput: float
    valid: bool = True


def shortfall(points: Sequence[Point], attainment: float, tolerance: float) -> str:
    """Why the answer is not known to within `tolerance`; empty if it is."""
    found, failed = best(points, attainment), _lowest_failed(points, attainment)
    if found is None:
        return f"no rate that was tried reached {attainment:.0%}; the figures are those of the lowest"
    if failed is not None and failed / found.rate <= 1 + tolerance:
        return ""
    span = f"at least {found.rate:.4g} requests/s" + (f", less than {failed:.4g}" if failed is not None else "")
    if invalid := [point.rate for point in points if not point.valid]:
        return f"the highest rate is {span}: at {min(invalid):.4g} the client was the bottleneck"
    tried = "1 rate" if len(points) == 1 else f"{len(points)} rates"
    return f"the highest rate is {span}: the search ended after {tried}"


def best(points: Sequence[Point], attainment: float) -> Point | None:
    """The highest rate that reached the attainment below the lowest that did not: runs are noisy."""
    ceiling = _lowest_failed(points, attainment)
    reached = [point for point in points if point.valid and attainment <= point.attainment]
    below = [point for point in reached if ceiling is None or point.rate < ceiling]
    return max(below, key=lambda point: point.rate, default=None)


def next_rate(points: Sequence[Point], start: float, attainment: float, tolerance: float) -> float | None:
    """The rate to try next; None if the answer is known to within `tolerance` (0.05: 5 %) or can't be found. A point
    with the client as the bottleneck ends the search: this client can't measure higher rates."""
    if not points:
        return start
    if len(points) >= MOST_POINTS or not all(point.valid for point in points):
        return None
    found, failed = best(points, attainment), _lowest_failed(points, attainment)
    if failed is None:
        return 2 * max(point.rate for point in points)
    if found is None:
        return failed / 2 if failed / 2 >= LEAST_RATE else None
    return (found.rate + failed) / 2 if failed / found.rate > 1 + tolerance else None


def _lowest_failed(points: Sequence[Point], attainment: float) -> float | None:
    """Of valid points: with the client as the bottleneck, a miss says nothing about the server."""
    return min((point.rate for point in points if point.valid and point.attainment < attainment), default=None)
