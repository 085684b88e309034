"""A request's timeline as a picture for the terminal: a row per phase, each bar where and as long as it was.

The phases follow one another: what computing hid of the transfer lies inside prefill and gets no bar of its own.
Durations of different processes are laid end to end; nobody compares two machines' clocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from baton.client.types import Finished, Path, Timeline

BAR_CELLS = 30
NAME_CELLS = 10


@dataclass(frozen=True, slots=True)
class Phase:
    """One row; `ms` is None where the phase did not take place."""

    name: str
    ms: float | None
    colour: str
    note: str = ""


def phases(timeline: Timeline) -> list[Phase]:
    """In order of time."""
    moved = ""
    if timeline.transport:
        moved = f"{timeline.transport}, {timeline.transfer_blocks} blocks, {_bytes(timeline.transfer_bytes)}"
    return [
        Phase("router", timeline.router_ms, "blue"),
        Phase("queue", timeline.queue_ms, "yellow"),
        Phase("prefill", timeline.prefill_ms, "green", timeline.prefill_worker),
        Phase("transfer", timeline.transfer_exposed_ms, "red", moved),
        Phase("wait", timeline.first_step_wait_ms, "yellow"),
        Phase("decode", timeline.decode_ms, "cyan", timeline.decode_worker),
    ]


def span(start_ms: float, ms: float, whole_ms: float) -> tuple[int, int]:
    """Cells before the bar, and in it. What took any time at all gets a cell."""
    if ms <= 0:
        return 0, 0
    scale = BAR_CELLS / whole_ms
    first = min(round(start_ms * scale), BAR_CELLS - 1)
    last = min(round((start_ms + ms) * scale), BAR_CELLS)
    return first, max(last - first, 1)


@dataclass(frozen=True, slots=True)
class Picture:
    """A rich renderable."""

    finished: Finished

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        fill, frame = ("█", "│") if options.encoding.lower().startswith("utf") else ("#", "|")
        yield from self._rows(fill, frame)
        yield Text(_summary(self.finished), style="dim", no_wrap=True)

    def _rows(self, fill: str, frame: str) -> Iterator[Text]:
        rows = phases(self.finished.timeline)
        whole = sum(phase.ms or 0.0 for phase in rows)
        start = 0.0
        for phase in rows:
            before, length = span(start, phase.ms or 0.0, whole)
            row = Text(f"  {phase.name:<{NAME_CELLS}}{frame}{' ' * before}", no_wrap=True, overflow="ellipsis")
            row.append(fill * length, style=phase.colour)
            row.append(f"{' ' * (BAR_CELLS - before - length)}{frame}")
            row.append("         -  " if phase.ms is None else f"{phase.ms:>7.1f} ms")
            row.append(f"  {phase.note}".rstrip(), style="dim")
            yield row
            start += phase.ms or 0.0


def draw(finished: Finished) -> Picture:
    """For `Console.print`; 80 columns are enough, and it reads without colour too."""
    return Picture(finished)


def _summary(finished: Finished) -> str:
    timeline, usage = finished.timeline, finished.usage
    parts = [f"TTFT {timeline.ttft_ms:.1f} ms"]
    if timeline.tpot_ms is not None:
        parts.append(f"TPOT {timeline.tpot_ms:.1f} ms")
    parts.append(f"{usage.prompt_tokens} tokens in, {usage.output_tokens} out")
    parts.append(f"{timeline.total_ms:.0f} ms in all")
    if timeline.simulated:
        parts.append("SIMULATED: no model computed this")
    if timeline.path is Path.PREFILL_ONLY:
        parts.append("ended in prefill")
    return "  " + ", ".join(parts)


def _bytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.0f} kB"
