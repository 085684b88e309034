"""The tables of the report and of the terminal: the same rows for both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from baton.bench.figures.metrics import Distribution, Promise, Summary
from baton.bench.figures.verdict import ClientHealth

NONE = "-"


@dataclass(frozen=True, slots=True)
class Table:
    """Cells as they are shown."""

    title: str
    columns: tuple[str, ...]
    rows: list[list[str]]


def overview(summary: Summary) -> Table:
    """The figures that one asks for first."""
    columns = ("requests", "sent / s", "attainment", "goodput / s", "refused", "failed", "output tokens / s")
    failed = sum(count for status, count in summary.statuses.items() if status != "OK") - summary.refusals.count
    row = [
        str(summary.requests),
        f"{summary.rate:.3g}",
        f"{summary.attainment:.1%}",
        f"{summary.goodput:.3g}",
        str(summary.refusals.count),
        str(failed),
        f"{summary.output_tokens_per_s:.4g}",
    ]
    return Table("Overview", columns, [row])


def latency_table(summary: Summary) -> Table:
    """Percentiles in milliseconds."""
    columns = ("ms", "p50", "p90", "p95", "p99", "mean", "max", "count")
    named = (
        ("TTFT", summary.ttft_ms),
        ("TPOT", summary.tpot_ms),
        ("ITL", summary.itl_ms),
        ("whole answer", summary.total_ms),
        ("until refused", summary.refusals.answer_ms),
        ("TTFT less the router's", summary.cross_check.ttft_difference_ms),
        ("TPOT less the router's", summary.cross_check.tpot_difference_ms),
    )
    return Table("Latencies", columns, [[name, *_cells(found)] for name, found in named if found is not None])


def _cells(found: Distribution) -> list[str]:
    values = (found.p50, found.p90, found.p95, found.p99, found.mean, found.max)
    return [*(f"{value:.1f}" for value in values), str(found.count)]


def class_table(classes: Mapping[str, Summary]) -> Table:
    """A row per class, if there are several."""
    columns = ("class", "requests", "attainment", "TTFT kept", "TPOT kept", "goodput / s", "TTFT p99 ms", "TPOT p99 ms")
    rows = []
    for name, summary in classes.items():
        shares = (summary.attainment, summary.ttft_attainment, summary.tpot_attainment)
        tails = [NONE if found is None else f"{found.p99:.1f}" for found in (summary.ttft_ms, summary.tpot_ms)]
        shown = [NONE if share is None else f"{share:.1%}" for share in shares]
        rows.append([name, str(summary.requests), *shown, f"{summary.goodput:.3g}", *tails])
    return Table("Classes", columns, rows if len(rows) > 1 else [])


def promise_table(summary: Summary) -> Table:
    """What the router promised at admission against what came; empty where it promised nothing."""
    columns = ("promise", "requests", "achieved within 1.2 x", "promised / achieved p50", "error p50", "error p90")
    named = (("TTFT", summary.ttft_promise), ("TPOT", summary.tpot_promise))
    return Table("Promises", columns, [_promise_row(name, found) for name, found in named if found is not None])


def _promise_row(name: str, found: Promise) -> list[str]:
    ratio = f"{found.promised_over_achieved_p50:.3f}"
    return [
        name,
        str(found.count),
        f"{found.kept_share:.1%}",
        ratio,
        f"{found.error_p50:.1%}",
        f"{found.error_p90:.1%}",
    ]


def client_table(health: ClientHealth) -> Table:
    """How the load generator itself did."""
    columns = ("this client", "p50", "p99", "max")
    rows = [
        [name, f"{found.p50:.2f} ms", f"{found.p99:.2f} ms", f"{found.max:.2f} ms"]
        for name, found in (("late with sending", health.late_ms), ("lag of its loop", health.lag_ms))
        if found is not None
    ]
    rows.append(
        ["its loop's share of a core (mean, max)", f"{health.loop_share_mean:.0%}", "", f"{health.loop_share_max:.0%}"]
    )
    busy = f"all its threads' share of a core, of {health.cores} (mean, max)"
    rows.append([busy, f"{health.process_share_mean:.0%}", "", f"{health.process_share_max:.0%}"])
    return Table("The client", columns, rows)
