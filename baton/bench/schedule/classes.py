"""Classes of requests: share of the traffic, objectives, priority."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast, get_args

from baton.client.types import RequestOptions, WhenUnmet
from baton.errors import ConfigError

FORM = "NAME:WEIGHT[:ttft_ms=N,tpot_ms=N,priority=N,when_unmet=refuse|best_effort]"
PRIORITIES = range(-100, 101)


@dataclass(frozen=True, slots=True)
class TrafficClass:
    """`weight` is relative to the other classes' weights."""

    name: str = "all"
    weight: float = 1.0
    ttft_ms: float | None = None
    tpot_ms: float | None = None
    priority: int = 0
    when_unmet: WhenUnmet | None = None

    def options(self) -> RequestOptions:
        """The options of this class's requests, without those that have their default."""
        given = {name: getattr(self, name) for name in ("ttft_ms", "tpot_ms", "priority", "when_unmet")}
        return cast(RequestOptions, {name: value for name, value in given.items() if value})


def parse_classes(slo: str, entries: Sequence[str], when_unmet: WhenUnmet | None) -> tuple[TrafficClass, ...]:
    """The classes of `--class`, each with the settings of `--slo` as defaults; without any, one class of all traffic.
    Raises ConfigError naming `slo` or `class`."""
    base = _with_settings(TrafficClass(when_unmet=when_unmet), slo, "slo")
    classes = tuple(_parse_class(base, entry) for entry in entries) or (base,)
    names = [entry.name for entry in classes]
    if len(set(names)) < len(names):
        raise ConfigError(f"class: a name is given twice: {', '.join(names)}")
    return classes


def _parse_class(base: TrafficClass, text: str) -> TrafficClass:
    name, _, rest = text.partition(":")
    weight, _, settings = rest.partition(":")
    try:
        share = float(weight)
    except ValueError:
        share = 0.0
    if not name or not 0 < share < float("inf"):
        raise ConfigError(f"class: expected {FORM}, with a weight above 0, not {text!r}")
    return _with_settings(replace(base, name=name, weight=share), settings, "class")


def _with_settings(base: TrafficClass, text: str, field: str) -> TrafficClass:
    """`base` with the settings of `name=value,...`."""
    for entry in filter(None, text.split(",")):
        name, _, value = entry.partition("=")
        if name not in _PARSERS:
            raise ConfigError(f"{field}: expected ttft_ms, tpot_ms, priority or when_unmet, not {name!r}")
        base = replace(base, **{name: _PARSERS[name](value, f"{field}.{name}")})
    return base


def _when_unmet(text: str, field: str) -> str:
    if text not in get_args(WhenUnmet):
        raise ConfigError(f"{field}: refuse or best_effort, not {text!r}")
    return text


def _positive(text: str, field: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise ConfigError(f"{field}: milliseconds above 0, not {text!r}")
    return value


def _priority(text: str, field: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = PRIORITIES.stop
    if value not in PRIORITIES:
        raise ConfigError(f"{field}: a whole number from -100 to 100, not {text!r}")
    return value


_PARSERS: dict[str, Callable[[str, str], Any]] = {
    "ttft_ms": _positive, "tpot_ms": _positive, "priority": _priority, "when_unmet": _when_unmet,
}  # fmt: skip
