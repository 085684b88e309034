"""A request's timeline as a picture for the terminal: a row per phase, each bar where and as long as it was.

The phases follow one another: what computing hid of the transfer lies inside prefill and gets no bar of its own.
Durations of different processes are laid end to end: the clocks of two machines are never compared.
"""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from baton.client.types import Finished, Path, Timeline

BAR_CELLS = 30
NAME_CELLS = 10


@dataclass(frozen=True, slots=True)
class Bar:
    """A phase; `ms` is None where it did not take place."""

    name: str
    ms: float | None
    colour: str
    note: str = ""


def bars(timeline: Timeline) -> list[Bar]:
    """In order of time."""
    moved = ""
    if timeline.transport:
        moved = f"{timeline.transport}, {timeline.transfer_blocks} blocks, {_bytes(timeline.transfer_bytes)}"
    return [
        Bar("router", timeline.router_ms, "blue"),
        Bar("queue", timeline.queue_ms, "yellow"),
        Bar("prefill", timeline.prefill_ms, "green", timeline.prefill_worker),
        Bar("transfer", timeline.transfer_exposed_ms, "red", moved),
        Bar("wait", timeline.first_step_wait_ms, "yellow"),
        Bar("decode", timeline.decode_ms, "cyan", timeline.decode_worker),
    ]


def span(start_ms: float, ms: float, whole_ms: float) -> tuple[int, int]:
    """Cells before the bar, and in it: at least one for any time at all."""
    if ms <= 0:
        return 0, 0
    scale = BAR_CELLS / whole_ms
    first = min(round(start_ms * scale), BAR_CELLS - 1)
    last = min(round((start_ms + ms) * scale), BAR_CELLS)
    return first, max(last - first, 1)


@dataclass(frozen=True, slots=True)
class Picture:
    """A rich renderable. 80 columns are enough, and it reads without colour too."""

    finished: Finished

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        fill, frame = ("█", "│") if options.encoding.lower().startswith("utf") else ("#", "|")
        phases = bars(self.finished.timeline)
        whole = sum(bar.ms or 0.0 for bar in phases)
        start = 0.0
        for bar in phases:
            before, length = span(start, bar.ms or 0.0, whole)
            row = Text(f"  {bar.name:<{NAME_CELLS}}{frame}{' ' * before}", no_wrap=True, overflow="ellipsis")
            row.append(fill * length, style=bar.colour)
            row.append(f"{' ' * (BAR_CELLS - before - length)}{frame}")
            row.append("         -  " if bar.ms is None else f"{bar.ms:>7.1f} ms")
            row.append(f"  {bar.note}".rstrip(), style="dim")
            yield row
            start += bar.ms or 0.0
        yield Text(_summary(self.finished), style="dim", no_wrap=True)


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
