"""Logs, one line per event, counts of events, and memory."""

from __future__ import annotations

import logging
import resource
import sys
from collections import Counter
from pathlib import Path

import structlog


def configure_logs(role: str, *, level: str = "info", json: bool | None = None) -> None:
    """Sends structlog to stderr. `json` None: JSON unless stderr is a terminal. Prompts are never logged."""
    as_json = not sys.stderr.isatty() if json is None else json
    threshold = logging.getLevelNamesMapping()[level.upper()]
    renderer = structlog.processors.JSONRenderer() if as_json else structlog.dev.ConsoleRenderer()
    before: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    if not as_json:  # JSON escapes by itself
        before.append(_printable)
    structlog.configure(
        processors=[*before, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(threshold),
        logger_factory=structlog.PrintLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=True,
    )
    # Libraries, and the packages of ours that log by the standard library, come out in the same form.
    handler = logging.StreamHandler(sys.stderr)
    last = [structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer]
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(foreign_pre_chain=before, processors=last))
    logging.basicConfig(level=threshold, handlers=[handler], force=True)
    structlog.contextvars.bind_contextvars(role=role)


def printable(text: str) -> str:
    """With escapes for all that would end a line, move a cursor, turn the direction of writing or break an encoder."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _printable(_logger: object, _method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """What others sent must not write lines of its own into a terminal's log. Tracebacks keep theirs."""
    return {
        name: printable(value) if isinstance(value, str) and name != "exception" else value
        for name, value in event.items()
    }


class Counts:
    """Event counts of one process, by name, as `Admin.GetStatus` shows them."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()

    def add(self, name: str, amount: int = 1) -> None:
        self._counts[name] += amount

    def snapshot(self) -> dict[str, int]:
        return dict(self._counts)


def resident_bytes() -> int:
    """Of this process, now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()
