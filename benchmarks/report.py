"""The report of every benchmark: rows, as a table and as `bench-results/NAME.json`."""

from __future__ import annotations

import json
import platform
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

RESULTS = Path(__file__).parents[1] / "bench-results"
COLUMNS = (
    "case", "format", "unit", "ours", "peer", "theirs", "ratio", "target", "met", "of limit",
    r"min \[quartiles] max",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Row:
    """One case. A greater `ratio` is better for us; `theirs` is of `peer`.

    `format` names the formats of weights and KV, `of_limit` is the share of the hardware's limit, where known.
    """

    case: str
    unit: str
    ours: float
    peer: str
    theirs: float | None
    higher_is_better: bool
    target: str = ""
    met: bool | None = None
    spread: str = ""
    format: str = ""
    of_limit: float | None = None

    @property
    def ratio(self) -> float | None:
        """Ours over theirs, or the inverse if less is better."""
        if not self.theirs or self.ours <= 0:
            return None
        return self.ours / self.theirs if self.higher_is_better else self.theirs / self.ours


def spread(values: Sequence[float]) -> str:
    """Extremes and quartiles."""
    low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else (values[0],) * 3
    return f"{min(values):.4g} [{low:.4g} {high:.4g}] {max(values):.4g}"


def publish(name: str, rows: Sequence[Row]) -> bool:
    """Prints the table and writes the file, with arguments and commit; returns whether every target is met."""
    Console(width=150).print(_table(name, rows))
    RESULTS.mkdir(exist_ok=True)
    document = {
        "benchmark": name,
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "processor": _processor(),
        "arguments": sys.argv[1:],
        "commit": _commit(),
        "rows": [asdict(row) | {"ratio": row.ratio} for row in rows],
    }
    (RESULTS / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n")
    return all(row.met is not False for row in rows)


def _table(name: str, rows: Sequence[Row]) -> Table:
    """A table without the columns that are empty in every row."""
    lines = [_cells(row) for row in rows]
    table = Table(title=f"bench-{name}", title_justify="left")
    columns = [column for column in COLUMNS if any(line[column] for line in lines)]
    for column in columns:
        table.add_column(column, overflow="fold")
    for line in lines:
        table.add_row(*(escape(line[column]) for column in columns))
    return table


def _cells(row: Row) -> dict[str, str]:
    def shown(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    met = {True: "yes", False: "NO", None: ""}[row.met]
    figures = (f"{row.ours:.4g}", row.peer, shown(row.theirs, ".4g"), shown(row.ratio, ".3f"), row.target, met)
    return dict(
        zip(COLUMNS, (row.case, row.format, row.unit, *figures, shown(row.of_limit, ".0%"), row.spread), strict=True)
    )


def _commit() -> str:
    """With `-dirty` for a modified tree; empty without git."""
    git = shutil.which("git")
    if git is None:
        return ""
    asked = [git, "-C", str(RESULTS.parent), "describe", "--always", "--dirty", "--abbrev=12"]
    return subprocess.run(asked, capture_output=True, text=True, timeout=10).stdout.strip()


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()
