"""Line charts as inline SVG. The page's style sheet has the colours, for light and dark."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from math import ceil, floor, log10

WIDTH, HEIGHT = 720, 300
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 14, 46
LABEL_GAP = 14.0


@dataclass(frozen=True, slots=True)
class Line:
    """A curve, which a None as y interrupts."""

    name: str
    points: Sequence[tuple[float, float | None]]
    dots: bool = False


@dataclass(frozen=True, slots=True)
class Chart:
    """`bands` are shaded spans of x; `marks` are vertical, `levels` horizontal lines with labels."""

    title: str
    x_label: str
    y_label: str
    lines: Sequence[Line]
    x_log: bool = False
    y_most: float | None = None
    bands: Sequence[tuple[float, float]] = ()
    band_label: str = ""
    marks: Sequence[tuple[float, str]] = ()
    levels: Sequence[tuple[float, str]] = ()


@dataclass(frozen=True, slots=True)
class _Scale:
    """Maps values to pixels."""

    low: float
    high: float
    begin: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = (log10(self.low), log10(self.high)) if self.log else (self.low, self.high)
        place = (log10(max(value, self.low)) if self.log else value) - low
        return self.begin + (self.end - self.begin) * min(1.0, max(0.0, place / (high - low)))


def render(chart: Chart) -> str:
    """An `<svg>` element with its own title and legend."""
    ys = [y for line in chart.lines for _, y in line.points if y is not None]
    xs = [x for line in chart.lines for x, y in line.points if y is not None]
    if not xs:
        return f'<figure><figcaption>{escape(chart.title)}</figcaption><p class="none">No data.</p></figure>'
    xs += [at for at, _ in chart.marks]
    x_ticks = log_ticks(min(xs), max(xs)) if chart.x_log else nice_ticks(0.0, max(xs))
    y_most = max([*ys, *(level for level, _ in chart.levels)]) if chart.y_most is None else chart.y_most
    y_ticks = nice_ticks(0.0, y_most)
    x = _Scale(x_ticks[0], x_ticks[-1], LEFT, WIDTH - RIGHT, chart.x_log)
    y = _Scale(y_ticks[0], y_ticks[-1], HEIGHT - BOTTOM, TOP)
    parts = [_band(x, band) for band in chart.bands]
    parts += _axes(chart, x, y, x_ticks, y_ticks)
    parts += [_curve(line, index, x, y) for index, line in enumerate(chart.lines)]
    parts += _rules(chart, x, y)  # last: their texts stay on top
    return _figure(chart, "".join(parts))


def nice_ticks(low: float, high: float, count: int = 6) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten that cover the span."""
    span = (high - low) or 1.0
    raw = span / count
    power = 10.0 ** floor(log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)
    first, last = floor(low / step), ceil(round((low + span) / step, 9))
    return [index * step for index in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten (over many decades, only the powers) that cover the span."""
    low = max(low, 1e-3)
    high = max(high, low * 1.001)
    decades = range(floor(log10(low)), ceil(log10(high)) + 1)
    factors = (1.0,) if log10(high / low) > 3.5 else (1.0, 2.0, 5.0)
    ticks = [factor * 10.0**decade for decade in decades for factor in factors]
    first = max([tick for tick in ticks if tick <= low], default=ticks[0])
    last = min([tick for tick in ticks if tick >= high], default=ticks[-1])
    return [tick for tick in ticks if first <= tick <= last] if last > first else [first, first * 10]


def _figure(chart: Chart, inside: str) -> str:
    names = "".join(
        f'<span class="key"><i class="k{index % 6}"></i>{escape(line.name)}</span>'
        for index, line in enumerate(chart.lines)
    )
    if chart.bands and chart.band_label:
        names += f'<span class="key"><i class="kband"></i>{escape(chart.band_label)}</span>'
    return (
        f'<figure><figcaption>{escape(chart.title)}</figcaption><div class="legend">{names}</div>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(chart.title)}">{inside}</svg></figure>'
    )


def _across(kind: str, at: float) -> str:
    return f'<line class="{kind}" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>'


def _down(kind: str, at: float) -> str:
    return f'<line class="{kind}" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'


def _axes(chart: Chart, x: _Scale, y: _Scale, x_ticks: Sequence[float], y_ticks: Sequence[float]) -> list[str]:
    parts = []
    for tick in y_ticks:
        at = y(tick)
        parts.append(_across("grid", at))
        parts.append(f'<text class="tick" x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in x_ticks:
        at = x(tick)
        parts.append(_down("grid", at))
        parts.append(f'<text class="tick" x="{at:.1f}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">{tick:g}</text>')
    middle_x, middle_y = (LEFT + WIDTH - RIGHT) / 2, (TOP + HEIGHT - BOTTOM) / 2
    label, turn = 'text-anchor="middle"', f'transform="rotate(-90 14 {middle_y})"'
    parts.append(f'<text class="label" x="{middle_x}" y="{HEIGHT - 8}" {label}>{escape(chart.x_label)}</text>')
    parts.append(f'<text class="label" x="14" y="{middle_y}" {label} {turn}>{escape(chart.y_label)}</text>')
    return parts


def _band(x: _Scale, band: tuple[float, float]) -> str:
    begin, end = x(band[0]), x(band[1])
    return f'<rect class="band" x="{begin:.1f}" y="{TOP}" width="{end - begin:.1f}" height="{HEIGHT - BOTTOM - TOP}"/>'


def _rules(chart: Chart, x: _Scale, y: _Scale) -> list[str]:
    parts = []
    for index, (value, text) in enumerate(chart.marks):
        at, row = x(value), TOP + LABEL_GAP * (index % 8 + 1)
        side, shift = ("end", -4) if at > WIDTH * 0.7 else ("start", 4)
        parts.append(_down("rule", at))
        parts.append(f'<text class="note" x="{at + shift:.1f}" y="{row}" text-anchor="{side}">{escape(text)}</text>')
    for value, text in chart.levels:
        at = y(value)
        parts.append(_across("rule", at))
        parts.append(f'<text class="note" x="{LEFT + 6}" y="{at - 4:.1f}">{escape(text)}</text>')
    return parts


def _curve(line: Line, index: int, x: _Scale, y: _Scale) -> str:
    places = [None if value is None else (x(at), y(value)) for at, value in line.points]
    commands, pen_up = [], True
    for place in places:
        if place is not None:
            commands.append(f"{'M' if pen_up else 'L'}{place[0]:.1f} {place[1]:.1f}")
        pen_up = place is None
    dots = [
        f'<circle class="s{index % 6}" cx="{place[0]:.1f}" cy="{place[1]:.1f}" r="3.5"/>'
        for number, place in enumerate(places)
        if place is not None and (line.dots or _alone(places, number))
    ]
    return f'<path class="c{index % 6}" d="{"".join(commands)}"/>{"".join(dots)}'


def _alone(places: Sequence[tuple[float, float] | None], number: int) -> bool:
    """Whether a point lies between two gaps, where a path would have no length."""
    before = places[number - 1] if number else None
    after = places[number + 1] if number + 1 < len(places) else None
    return before is None and after is None
