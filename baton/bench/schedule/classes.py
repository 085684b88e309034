"""Classes of requests: each with its share of the traffic, its objectives and its priority."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from baton.client.types import RequestOptions, WhenUnmet
from baton.errors import ConfigError

FORM = "NAME:WEIGHT[:ttft_ms=N,tpot_ms=N,priority=N,when_unmet=refuse|best_effort]"
PRIORITIES = range(-100, 101)


@dataclass(frozen=True, slots=True)
class TrafficClass:
    """`weight` is relative to those of the other classes. An objective that is None is none."""

    name: str = "all"
    weight: float = 1.0
    ttft_ms: float | None = None
    tpot_ms: float | None = None
    priority: int = 0
    when_unmet: WhenUnmet | None = None

    def options(self) -> RequestOptions:
        """What a request of this class says of itself."""
        options = RequestOptions()
        if self.ttft_ms is not None:
            options["ttft_ms"] = self.ttft_ms
        if self.tpot_ms is not None:
            options["tpot_ms"] = self.tpot_ms
        if self.priority:
            options["priority"] = self.priority
        if self.when_unmet is not None:
            options["when_unmet"] = self.when_unmet
        return options


def parse_classes(slo: str, entries: Sequence[str], when_unmet: WhenUnmet | None) -> tuple[TrafficClass, ...]:
    """The classes of `--class`, each on top of what `--slo` says; without any, one that has all the traffic.

    Raises ConfigError naming `slo` or `class`.
    """
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
    """`base` with `name=value,...` laid over it."""
    for entry in filter(None, text.split(",")):
        name, _, value = entry.partition("=")
        match name:
            case "ttft_ms":
                base = replace(base, ttft_ms=_positive(value, f"{field}.{name}"))
            case "tpot_ms":
                base = replace(base, tpot_ms=_positive(value, f"{field}.{name}"))
            case "priority":
                base = replace(base, priority=_priority(value, f"{field}.{name}"))
            case "when_unmet" if value == "refuse":
                base = replace(base, when_unmet="refuse")
            case "when_unmet" if value == "best_effort":
                base = replace(base, when_unmet="best_effort")
            case "when_unmet":
                raise ConfigError(f"{field}.{name}: refuse or best_effort, not {value!r}")
            case _:
                raise ConfigError(f"{field}: expected ttft_ms, tpot_ms, priority or when_unmet, not {name!r}")
    return base


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
