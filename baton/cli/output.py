"""What commands print: events as JSON lines or as running text, tables, logs of probabilities."""

from __future__ import annotations

import json
import sys
from collections.abc import AsyncIterator, Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console
from rich.table import Table

from baton.client.types import Event, Finished, Tokens
from baton.errors import BatonError, FieldError, Internal, InvalidArgument, Retryable
from baton.rpc.status import code_of

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Rows = Iterable[Iterable[object]]
WIDE = 160
"""Columns of a table that goes to a file or a pipe, where nothing is cut off."""


def console(file: TextIO | None = None) -> Console:
    """As wide as the terminal, and without markup of our own text."""
    target = file or sys.stdout
    return Console(file=target, width=None if target.isatty() else WIDE, highlight=False, markup=False)


def show(found: DataclassInstance | list[Any], as_json: bool, columns: tuple[str, ...], rows: Rows) -> None:
    """Prints dataclasses as JSON or as the rows of a table."""
    if as_json:
        print_json([to_dict(entry) for entry in found] if isinstance(found, list) else to_dict(found))
    else:
        print_table(columns, rows)


def print_table(columns: tuple[str, ...], rows: Rows) -> None:
    """Left-aligned, without lines."""
    table = Table(*columns, box=None, pad_edge=False, header_style="bold")
    for row in rows:
        table.add_row(*map(str, row))
    console().print(table)


def print_json(value: Any) -> None:
    print(json.dumps(value, ensure_ascii=False), flush=True)


def to_dict(value: DataclassInstance) -> dict[str, Any]:
    """For JSON: None is left out, at any depth."""
    return asdict(value, dict_factory=lambda pairs: {key: value for key, value in pairs if value is not None})


def print_error_event(error: BatonError) -> None:
    """As `{"event": "error", "code": "UNAVAILABLE", "message": ...}`."""
    entry: dict[str, Any] = {"event": "error", "code": code_of(error).name, "message": str(error)}
    if isinstance(error, FieldError) and error.field:
        entry["field"] = error.field
    if isinstance(error, Retryable) and error.retry_after_s is not None:
        entry["retry_after_s"] = error.retry_after_s
    print_json(entry)


async def show_stream(
    events: AsyncIterator[Event], *, as_json: bool, spoken: list[str]
) -> tuple[Finished, list[Tokens]]:
    """Prints a stream to its end, in text or JSON. `spoken` gets each piece of text that was shown."""
    finished: Finished | None = None
    runs: list[Tokens] = []
    try:
        async for event in events:
            if as_json:
                print_json({"event": type(event).__name__.lower(), **to_dict(event)})
            if isinstance(event, Tokens):
                runs.append(event)
                spoken.append(event.text)
                if not as_json:
                    print(event.text, end="", flush=True)
            elif isinstance(event, Finished):
                finished = event
    except BatonError as error:
        if as_json:
            print_error_event(error)
        raise
    finally:
        if not as_json and any(spoken):
            print(flush=True)
    if finished is None:
        raise Internal("the server ended the stream without a result")
    return finished, runs


def print_logprobs(runs: list[Tokens]) -> None:
    """A line per token: position, id, log-probability, and the alternatives as id:log-probability."""
    for run in runs:
        for offset, (token, entry) in enumerate(zip(run.ids, run.logprobs, strict=False)):
            best = " ".join(f"{other}:{value:.3f}" for other, value in entry.top)
            print(f"{run.position + offset:>6}  {token:>7}  {entry.logprob:>9.4f}  {best}".rstrip())


def read_text(text: str, what: str = "prompt") -> str:
    """The text itself, or all of stdin for "-". Raises InvalidArgument when it is not UTF-8, or empty."""
    if text != "-":
        return check_text(text, what)
    try:
        return check_text(sys.stdin.buffer.read().decode(), what)
    except UnicodeDecodeError as error:
        raise InvalidArgument(what, f"is not valid UTF-8: {error.reason} at byte {error.start}") from None


def check_text(text: str, what: str) -> str:
    """The text. Raises InvalidArgument when it is empty, or came from bytes that are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidArgument(what, "is not valid UTF-8") from None
    if not text:
        raise InvalidArgument(what, "is empty")
    return text
