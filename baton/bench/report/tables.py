"""The tables that report and terminal share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from baton.bench.figures.metrics import Summary
from baton.bench.figures.verdict import ClientHealth

NONE = "-"


@dataclass(frozen=True, slots=True)
class Table:
    title: str
    columns: tuple[str, ...]
    rows: list[list[str]]


def overview(summary: Summary) -> Table:
    columns = ("requests", "sent / s", "attainment", "goodput / s", "refused", "failed", "output tokens / s")
    failed = sum(count for status, count in summary.statuses.items() if status != "OK") - summary.refusals.count
    row = [str(summary.requests), f"{summary.rate:.3g}", f"{summary.attainment:.1%}", f"{summary.goodput:.3g}"]
    row += [str(summary.refusals.count), str(failed), f"{summary.output_tokens_per_s:.4g}"]
    return Table("Overview", columns, [row])


def latency_table(summary: Summary) -> Table:
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
    rows = []
    for name, found in named:
        if found is not None:
            values = (found.p50, found.p90, found.p95, found.p99, found.mean, found.max)
            rows.append([name, *(f"{value:.1f}" for value in values), str(found.count)])
    return Table("Latencies", columns, rows)


def class_table(classes: Mapping[str, Summary]) -> Table:
    """A row per class; no rows for a single class."""
    columns = ("class", "requests", "attainment", "TTFT kept", "TPOT kept", "goodput / s", "TTFT p99 ms", "TPOT p99 ms")
    rows = []
    for name, summary in classes.items():
        shares = (summary.attainment, summary.ttft_attainment, summary.tpot_attainment)
        tails = [NONE if found is None else f"{found.p99:.1f}" for found in (summary.ttft_ms, summary.tpot_ms)]
        shown = [NONE if share is None else f"{share:.1%}" for share in shares]
        rows.append([name, str(summary.requests), *shown, f"{summary.goodput:.3g}", *tails])
    return Table("Classes", columns, rows if len(rows) > 1 else [])


def promise_table(summary: Summary) -> Table:
    """Promises at admission against achieved times; no rows without promises."""
    columns = ("promise", "requests", "achieved within 1.2 x", "promised / achieved p50", "error p50", "error p90")
    named = (("TTFT", summary.ttft_promise), ("TPOT", summary.tpot_promise))
    rows = []
    for name, found in named:
        if found is not None:
            shares = [f"{found.kept_share:.1%}", f"{found.promised_over_achieved_p50:.3f}"]
            rows.append([name, str(found.count), *shares, f"{found.error_p50:.1%}", f"{found.error_p90:.1%}"])
    return Table("Promises", columns, rows)


def client_table(health: ClientHealth) -> Table:
    columns = ("this client", "p50", "p99", "max")
    rows = [
        [name, f"{found.p50:.2f} ms", f"{found.p99:.2f} ms", f"{found.max:.2f} ms"]
        for name, found in (("late with sending", health.late_ms), ("lag of its loop", health.lag_ms))
        if found is not None
    ]
    loop, threads = "its loop's share of a core", f"all its threads' share of a core, of {health.cores}"
    rows.append([f"{loop} (mean, max)", f"{health.loop_share_mean:.0%}", "", f"{health.loop_share_max:.0%}"])
    rows.append([f"{threads} (mean, max)", f"{health.process_share_mean:.0%}", "", f"{health.process_share_max:.0%}"])
    return Table("The client", columns, rows)
