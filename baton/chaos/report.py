"""A chaos run in words, for a terminal and for a log: pure functions that make lines."""

from __future__ import annotations

from baton.chaos.harm import Happening
from baton.chaos.plan import ChaosPlan
from baton.chaos.verdict import Difference, Judgement

SHOWN = 20
"""Differences that are told one by one."""
LONGEST = 160
"""Characters of what was expected and of what came."""


def opening(plan: ChaosPlan) -> list[str]:
    kinds = sorted({strike.kind for strike in plan.strikes})
    events = ", ".join(f"{sum(strike.kind == kind for strike in plan.strikes)} {kind}" for kind in kinds)
    return [
        f"seed {plan.seed}: {plan.seconds:g} s of harm: {events}",
        f"{len(plan.scripts)} requests in turn, {plan.at_once} streams at once",
        "the seed decides on requests and events; in what state they meet the cluster differs from run to run",
    ]


def time_line(event: Happening) -> str:
    """One event."""
    streams = f"{event.streams} stream{'' if event.streams == 1 else 's'}"
    return f"{event.at_s:8.2f} s  {event.kind:<8}{event.target:<14}{streams:<12}{event.note}".rstrip()


def summary(judgement: Judgement) -> list[str]:
    """The table at the end, with all that is wrong."""
    rows: list[tuple[str, object]] = [
        ("streams", judgement.streams),
        ("identical", judgement.identical),
        ("cancelled by their client", judgement.cancelled),
        ("ended by two deaths", judgement.poisoned),
        ("ended by the third attempt", judgement.exhausted),
        ("lived through an event", f"{judgement.lived} ({judgement.share:.0%} of the complete ones)"),
        *((f"event {kind}", count) for kind, count in judgement.events.items()),
        ("failovers", judgement.failovers),
        ("differences", len(judgement.differences)),
        ("left over", len(judgement.leftovers)),
    ]
    lines = [f"{name:<28}{value}" for name, value in rows]
    lines += [_difference(found) for found in judgement.differences[:SHOWN]]
    if (more := len(judgement.differences) - SHOWN) > 0:
        lines.append(f"... and {more} more differences")
    lines += [f"left over: {line}" for line in judgement.leftovers]
    if judgement.good:
        return [*lines, "all is well"]
    return [*lines, *(f"FAILED: {line}" for line in judgement.complaints)]


def _difference(found: Difference) -> str:
    where = f" at position {found.position}" if found.position >= 0 else ""
    return f"difference: {found.label}: {found.what}{where}: expected {_cut(found.expected)}, got {_cut(found.got)}"


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."
