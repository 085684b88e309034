"""The table of `make test-hostile`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class Row(NamedTuple):
    """One figure of a case, what it may be, and whether it is."""

    case: str
    bound: str
    measured: str
    met: bool


def at_most(case: str, bound: float, measured: float, unit: str = "") -> Row:
    return Row(case, f"<= {bound:g} {unit}".strip(), f"{measured:.3g} {unit}".strip(), measured <= bound)


def equal(case: str, wanted: object, found: object) -> Row:
    return Row(case, str(wanted), str(found), wanted == found)


def lines(rows: Iterable[Row]) -> list[str]:
    """The table, in columns."""
    table = [Row("case", "bound", "measured", met=True), *rows]
    widths = [max(len(str(row[column])) for row in table) for column in range(3)]
    shown = []
    for row in table:
        cells = [str(row[column]).ljust(widths[column]) for column in range(3)]
        shown.append("  ".join([*cells, "" if row.met else "MISSED"]).rstrip())
    return shown
