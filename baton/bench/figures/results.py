"""A measurement as a document, for `--json` and `--compare`, and a row per request, for `--csv`."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path
from typing import Any

from baton.bench.figures.metrics import Summary, by_class, counted, summarize
from baton.bench.figures.series import Series, series_of
from baton.bench.figures.verdict import ClientHealth, Verdict, health_of, judge
from baton.bench.schedule.config import LoadConfig, SweepConfig
from baton.bench.sending.driver import LoadRun
from baton.bench.sending.records import Record
from baton.bench.sweep import Point
from baton.errors import ConfigError

FORMAT = 1
CSV_COLUMNS = (
    "index", "class", "due_s", "late_ms", "status", "prompt_tokens", "max_output_tokens", "output_tokens", "ttft_ms",
    "tpot_ms", "itl_max_ms", "total_ms", "ttft_kept", "tpot_kept", "promised_ttft_ms", "promised_tpot_ms",
    "server_ttft_ms", "server_tpot_ms", "queue_ms", "prefill_ms", "decode_ms", "path", "prefill_worker",
    "decode_worker", "cached_prompt_tokens", "message",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Measurement:
    """The figures of a run; of a sweep, those of its best run, with its goal, all points and the best point, if any."""

    address: str
    model: str
    at: str
    config: LoadConfig
    window_s: float
    summary: Summary
    classes: dict[str, Summary]
    health: ClientHealth
    verdict: Verdict
    series: Series
    search: SweepConfig | None = None
    sweep: tuple[Point, ...] = ()
    found: Point | None = None


def measure(run: LoadRun, config: LoadConfig, address: str, model: str) -> Measurement:
    plan, chosen = run.plan, counted(run.records, run.plan.warmup_s)
    summary = summarize(chosen, plan.window_s, plan.warmup_s)
    classes = by_class(chosen, plan.window_s, plan.warmup_s)
    health = health_of(run)
    verdict = judge(run, health, summary.cross_check, config)
    at, series = datetime.now(UTC).isoformat(timespec="seconds"), series_of(run.records, plan.end_s)
    return Measurement(address, model, at, config, plan.window_s, summary, classes, health, verdict, series)


def document(found: Measurement) -> dict[str, Any]:
    """Plain JSON values; a missing figure is null."""
    plain = asdict(found)
    plain["config"]["trace"] = None if found.config.trace is None else str(found.config.trace)
    return {"baton_bench": FORMAT, **plain}


def write_json(found: Measurement, path: Path) -> None:
    """Raises OSError."""
    path.write_text(json.dumps(document(found), indent=1, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """Reads a file of `write_json`. Raises ConfigError naming the file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"compare: can't read {path}: {(error.strerror or str(error)).lower()}") from None
    except ValueError:
        raise ConfigError(f"compare: {path} is not JSON") from None
    if not isinstance(found, dict) or found.get("baton_bench") != FORMAT:
        raise ConfigError(f"compare: {path} is not a result of `baton bench --json` of this version")
    if missing := [name.name for name in fields(Measurement) if name.name not in found]:
        raise ConfigError(f"compare: {path} lacks {', '.join(missing)}")
    return found


def write_csv(records: Sequence[Record], path: Path) -> None:
    """A row per planned request, with those of the warm-up. Raises OSError."""
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(CSV_COLUMNS)
        rows.writerows([_cell(value) for value in _row(record)] for record in records)


def _row(record: Record) -> tuple[Any, ...]:
    planned, accepted, finished = record.planned, record.accepted, record.finished
    timeline = finished.timeline if finished else None
    served = ("ttft_ms", "tpot_ms", "queue_ms", "prefill_ms", "decode_ms", "path", "prefill_worker", "decode_worker")
    return (
        planned.index, planned.traffic.name, planned.at_s, record.late_ms, record.status, planned.prompt_tokens,
        planned.output_tokens, record.output_tokens, record.ttft_ms, record.tpot_ms,
        max(record.gaps_ms, default=None), record.total_ms, record.ttft_kept, record.tpot_kept,
        *(getattr(accepted, name, None) for name in ("predicted_ttft_ms", "predicted_tpot_ms")),
        *(getattr(timeline, name, None) for name in served),
        finished.usage.cached_prompt_tokens if finished else None, record.message,
    )  # fmt: skip


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Enum):
        return str(value.value)
    return f"{value:.3f}" if isinstance(value, float) else str(value)
