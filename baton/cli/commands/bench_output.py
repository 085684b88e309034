"""What `baton bench` shows: where the run stands, on stderr; its figures, on stdout."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table as RichTable

from baton.bench.figures.compare import compare, differences
from baton.bench.figures.results import Measurement, read_json
from baton.bench.report import tables
from baton.bench.sending.driver import Progress as Where
from baton.bench.sweep import Point
from baton.cli.output import console

PLAIN_EVERY_S = 5.0


class Screen:
    """Shows a run's progress: a bar on a terminal, else a line every few seconds."""

    def __init__(self, bar: Progress | None) -> None:
        self._bar = bar
        self._task = bar.add_task("", total=None) if bar else None
        self._next_line = time.monotonic() + PLAIN_EVERY_S

    def watch(self, where: Where) -> None:
        """To be called now and then; cheap."""
        text = (
            f"{where.elapsed_s:.0f} s  sent {where.sent}/{where.planned}  under way {where.sent - where.ended}  "
            f"refused or failed {where.failed}  tokens {where.tokens}"
        )
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, description=text, total=where.planned, completed=where.ended)
            self._bar.refresh()
        elif time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + PLAIN_EVERY_S
            print(text, file=sys.stderr, flush=True)

    def tell(self, point: Point) -> None:
        line = f"{point.rate:.4g} requests/s: {point.attainment:.1%} kept, goodput {point.goodput:.4g}/s"
        line += "" if point.valid else " (INVALID: the client was the bottleneck)"
        if self._bar is not None:
            self._bar.console.print(line)
        else:
            print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def watching() -> Iterator[Screen]:
    screen = console(sys.stderr)
    if not screen.is_terminal:
        yield Screen(None)
        return
    with Progress(
        BarColumn(), TextColumn("{task.description}"), console=screen, auto_refresh=False, transient=True
    ) as bar:
        yield Screen(bar)


def show(found: Measurement) -> None:
    screen = console()
    screen.print(f"{found.model} at {found.address}, {found.summary.rate:.4g} requests/s over {found.window_s:.4g} s")
    if found.sweep and found.found is not None:
        screen.print(f"highest rate found: {found.found.rate:.4g} requests/s, goodput {found.found.goodput:.4g}/s")
    summary = found.summary
    for table in (
        tables.overview(summary),
        tables.latency_table(summary),
        tables.class_table(found.classes),
        tables.promise_table(summary),
        tables.client_table(found.health),
    ):
        if table.rows:
            screen.print()
            screen.print(_rich(table))
    statuses = [f"{count} {status}" for status, count in sorted(summary.statuses.items())]
    screen.print(f"\nended: {', '.join(statuses)}")
    for warning in found.verdict.warnings:
        screen.print(warning)


def show_comparison(a: Path, b: Path) -> None:
    """Raises ConfigError for a file that holds no result."""
    before, after = read_json(a), read_json(b)
    rows = []
    for row in compare(before, after):
        figures = [tables.NONE if value is None else f"{value:.4g}" for value in (row.a, row.b, row.ratio)]
        rows.append([row.metric, *figures, row.verdict])
    screen = console()
    screen.print(_rich(tables.Table("", ("metric", "A", "B", "B / A", "B is"), rows)))
    for line in differences(before, after):
        screen.print(f"differs: {line}")
    for name, found in (("A", before), ("B", after)):
        if not found["verdict"]["valid"]:
            screen.print(f"{name} is INVALID: its client was the bottleneck")


def _rich(table: tables.Table) -> RichTable:
    shown = RichTable(box=None, pad_edge=False, header_style="bold")
    for index, name in enumerate(table.columns):
        shown.add_column(name, justify="right" if index else "left")
    for row in table.rows:
        shown.add_row(*row)
    return shown
