"""`baton bench`: load a cluster, open loop, and say what it kept."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from baton.bench.schedule.config import LoadConfig, SweepConfig
from baton.cli.exits import FAILURE, INTERRUPTED, OK
from baton.cli.flags import DEFAULT_SERVER, Server, as_flags, run
from baton.errors import ConfigError

if TYPE_CHECKING:
    from baton.bench.figures.results import Measurement
    from baton.bench.sending.driver import LoadRun


@as_flags(classes=Parameter(name="--class"))
@dataclass(frozen=True, kw_only=True)
class LoadFlags(LoadConfig):
    """The load's settings."""


@as_flags()
@dataclass(frozen=True, kw_only=True)
class SweepFlags(SweepConfig):
    """What a sweep looks for."""


@Parameter(name="*")
@dataclass(frozen=True, slots=True, kw_only=True)
class Outputs:
    """Files to write; each is optional."""

    json: Path | None = None
    """Write all figures to this file."""
    csv: Path | None = None
    """Write a row per request to this file."""
    html: Path | None = None
    """Write the report with its plots to this file, which needs nothing else to be read."""

    def __post_init__(self) -> None:
        for name in ("json", "csv", "html"):
            path: Path | None = getattr(self, name)
            if path is None:
                continue
            # Rather now than after the run.
            if not path.absolute().parent.is_dir():
                raise ConfigError(f"{name}: there is no folder {path.parent}")
            if path.is_dir():
                raise ConfigError(f"{name}: {path} is a folder")
            if not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
                raise ConfigError(f"{name}: {path} can't be written")


def bench(
    *,
    server: Server = DEFAULT_SERVER,
    load: LoadFlags = LoadFlags(),
    sweep: Annotated[bool, Parameter(negative=())] = False,
    search: SweepFlags = SweepFlags(),
    compare: tuple[Path, Path] | None = None,
    outputs: Outputs = Outputs(),
) -> int:
    """Load a cluster at its own pace, whatever it answers, and report latencies, attainment and goodput.

    Exit status 1 when the client could not keep up, when no request got a token, or when a sweep found no rate.

    Parameters
    ----------
    sweep
        Find the highest rate that reaches the attainment, from --rate on.
    compare
        Send nothing; print the ratios of two results of --json, B over A.
    """
    from baton.cli.commands import bench_output as output

    if compare is not None:
        output.show_comparison(*compare)
        return OK
    found, ran, interrupted = _measured(server, load, search if sweep else None)
    output.show(found)
    written = _write(found, ran, outputs)
    if interrupted:
        return INTERRUPTED
    good = found.verdict.valid and any(record.stamps for record in ran.records) and not (sweep and found.found is None)
    return OK if good and written else FAILURE


def _measured(server: str, load: LoadConfig, sweep: SweepConfig | None) -> tuple[Measurement, LoadRun, bool]:
    """What was found, and whether Ctrl-C cut it short. What a sweep had measured by then is not lost."""
    from baton.bench.measuring import Search, measure_once, measure_sweep
    from baton.cli.commands import bench_output as output

    if sweep is None:
        with output.watching() as screen:
            return *run(lambda: measure_once(server, load, screen.watch)), False
    search = Search(sweep)
    try:
        with output.watching() as screen:
            return *run(lambda: measure_sweep(server, load, search, screen.watch, screen.tell)), False
    except KeyboardInterrupt:
        if not search.points:
            raise
        return *search.sum_up(), True


def _write(found: Measurement, ran: LoadRun, outputs: Outputs) -> bool:
    """Each file that was asked for, whatever became of the others; what can't be written is told."""
    from baton.bench.figures.results import write_csv, write_json
    from baton.bench.report.page import write_page

    writers: dict[str, Callable[[Path], None]] = {
        "json": lambda path: write_json(found, path),
        "csv": lambda path: write_csv(ran.records, path),
        "html": lambda path: write_page(found, ran.records, path),
    }
    written = True
    for name, write in writers.items():
        path: Path | None = getattr(outputs, name)
        try:
            if path is not None:
                write(path)
        except OSError as error:
            written = False
            print(f"baton: {name}: can't write {path}: {(error.strerror or str(error)).lower()}", file=sys.stderr)
    return written
