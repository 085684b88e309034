"""Two results side by side, metric by metric."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from baton.bench.sending.records import OK

LATENCIES = ("ttft_ms", "tpot_ms", "itl_ms", "total_ms")
PERCENTILES = ("p50", "p90", "p95", "p99")
RATES = ("rate", "attainment", "attainment_admitted", "goodput", "output_tokens_per_s", "prompt_tokens_per_s")


@dataclass(frozen=True, slots=True)
class Compared:
    """`ratio` is B over A; None where either is missing, or A is 0."""

    metric: str
    a: float | None
    b: float | None
    higher_is_better: bool | None

    @property
    def ratio(self) -> float | None:
        """B over A."""
        return self.b / self.a if self.a and self.b is not None else None

    @property
    def verdict(self) -> str:
        """`better`, `worse`, `same` (to four digits), or nothing where it can't be said."""
        if self.a is None or self.b is None or self.higher_is_better is None:
            return ""
        if abs(self.b - self.a) <= 1e-4 * abs(self.a):
            return "same"
        return "better" if (self.b > self.a) == self.higher_is_better else "worse"


def compare(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[Compared]:
    """Of two documents of `read_json`: all requests, then the classes that both have."""
    rows = list(_rows("", a["summary"], b["summary"]))
    for name in sorted(a["classes"].keys() & b["classes"].keys()):
        if len(a["classes"]) > 1 or len(b["classes"]) > 1:
            rows += _rows(f"{name}: ", a["classes"][name], b["classes"][name])
    return rows


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """What was loaded, for how long, and the settings of the load in which the two differ, as `rate: 1.0, 2.0`."""
    pairs = [(name, a[name], b[name]) for name in ("model", "address", "window_s")]
    names = sorted(a["config"].keys() | b["config"].keys())
    pairs += [(name, a["config"].get(name), b["config"].get(name)) for name in names if name != "model"]
    return [f"{name}: {before}, {after}" for name, before, after in pairs if before != after]


def _rows(prefix: str, a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[Compared]:
    for name in RATES:
        yield Compared(prefix + name, a[name], b[name], None if name == "rate" else True)
    for name in LATENCIES:
        for percentile in PERCENTILES:
            before, after = (side[name][percentile] if side[name] else None for side in (a, b))
            yield Compared(f"{prefix}{name} {percentile}", before, after, higher_is_better=False)
    for name, of in (("refused", _refused), ("failed", _failed)):
        yield Compared(f"{prefix}{name} (share)", of(a), of(b), False)


def _refused(summary: Mapping[str, Any]) -> float:
    return float(summary["refusals"]["count"] / summary["requests"])


def _failed(summary: Mapping[str, Any]) -> float:
    """Of all requests; neither served nor turned away."""
    bad = summary["requests"] - summary["statuses"].get(OK, 0) - summary["refusals"]["count"]
    return float(bad / summary["requests"])
