"""Recorded traffic: Azure's CSV (times and lengths) and Mooncake's JSONL (also which prefixes are shared)."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from baton.bench.schedule.config import TraceFormat
from baton.errors import ConfigError

T = TypeVar("T")
MOONCAKE_BLOCK = 512
"""Prompt tokens per hash id of Mooncake; a prompt's last block may be partly used."""
AZURE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """A recorded request: seconds after the first one, lengths in tokens, and the ids of its prompt's blocks. Equal
    block ids mean equal tokens; without ids the prompt shares nothing. `block_tokens` is a block's size."""

    at_s: float
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[int, ...] = ()
    block_tokens: int = 0


def read_trace(path: Path, form: TraceFormat) -> list[TraceRequest]:
    """Requests in order of time, the first at 0. Raises ConfigError naming line and field."""
    if form == "auto":
        known: dict[str, TraceFormat] = {".csv": "azure", ".jsonl": "mooncake"}
        if path.suffix not in known:
            raise ConfigError(f"trace_format: azure or mooncake? {path.name} ends in neither .csv nor .jsonl")
        form = known[path.suffix]
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:  # spreadsheets write a byte order mark
            entries = list(_azure(path, file) if form == "azure" else _mooncake(path, file))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise ConfigError(f"trace: can't read {path}: {reason}") from None
    if not entries:
        raise ConfigError(f"trace: {path} holds no request")
    entries.sort(key=lambda entry: entry.at_s)
    return [replace(entry, at_s=entry.at_s - entries[0].at_s) for entry in entries]


def scaled(entry: TraceRequest, factor: float) -> TraceRequest:
    """The request with its lengths multiplied. Blocks scale as a whole, so that shared tokens stay shared."""
    output = max(1, round(entry.output_tokens * factor))
    if not entry.blocks:
        return replace(entry, prompt_tokens=max(1, round(entry.prompt_tokens * factor)), output_tokens=output)
    block = max(1, round(entry.block_tokens * factor))
    prompt = max(1, round(entry.prompt_tokens * block / entry.block_tokens))
    return replace(entry, prompt_tokens=prompt, output_tokens=output, block_tokens=block)


def mean_rate(entries: Sequence[TraceRequest]) -> float:
    """Requests per second over the whole trace; 0 for a trace without duration."""
    duration = entries[-1].at_s
    return (len(entries) - 1) / duration if duration else 0.0


def _azure(path: Path, file: Any) -> Iterator[TraceRequest]:
    rows = csv.DictReader(file)
    missing = set(AZURE_COLUMNS) - set(rows.fieldnames or ())
    if missing:
        raise ConfigError(f"trace: {path}: no column {', '.join(sorted(missing))}")
    try:
        for row in rows:
            line = rows.line_num
            prompt, output = (_field(path, line, row, name, _count) for name in AZURE_COLUMNS[1:])
            yield TraceRequest(_field(path, line, row, AZURE_COLUMNS[0], _seconds), prompt, output)
    except csv.Error as error:
        raise ConfigError(f"trace: {path}:{rows.line_num}: not CSV: {error}") from None


def _mooncake(path: Path, file: Any) -> Iterator[TraceRequest]:
    for line, text in enumerate(file, 1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"trace: {path}:{line}: not JSON: {error.msg}") from None
        if not isinstance(row, dict):
            raise ConfigError(f"trace: {path}:{line}: expected an object")
        prompt = _field(path, line, row, "input_length", _count)
        blocks = _field(path, line, row, "hash_ids", lambda ids: tuple(_id(entry) for entry in ids))
        if len(blocks) * MOONCAKE_BLOCK < prompt:
            raise ConfigError(f"trace: {path}:{line}: hash_ids: {len(blocks)} blocks are too few for {prompt} tokens")
        at_s = _field(path, line, row, "timestamp", _finite) / 1e3
        yield TraceRequest(at_s, prompt, _field(path, line, row, "output_length", _count), blocks, MOONCAKE_BLOCK)


def _field(path: Path, line: int, row: dict[str, Any], name: str, convert: Callable[[Any], T]) -> T:
    try:
        return convert(row[name])
    except KeyError:
        raise ConfigError(f"trace: {path}:{line}: no {name}") from None
    except (ValueError, TypeError, OverflowError):
        raise ConfigError(f"trace: {path}:{line}: {name}: not {row[name]!r}") from None


def _seconds(text: str) -> float:
    """Drops digits beyond microseconds; a time without a zone is in UTC."""
    found = datetime.fromisoformat(re.sub(r"(\.\d{6})\d+", r"\1", text.strip()))
    return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()


def _finite(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError
    return number


def _count(value: Any) -> int:
    count = int(value)
    if count < 0 or isinstance(value, bool):
        raise ValueError
    return max(1, count)


def _id(value: Any) -> int:
    if not isinstance(value, int) or not 0 <= value < 2**63:
        raise ValueError
    return value
