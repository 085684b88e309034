"""Compares two results metric by metric."""

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
    """One metric of results A and B."""

    metric: str
    a: float | None
    b: float | None
    higher_is_better: bool | None

    @property
    def ratio(self) -> float | None:
        """B over A; None if either is missing or A is 0."""
        return self.b / self.a if self.a and self.b is not None else None

    @property
    def verdict(self) -> str:
        """`better`, `worse`, `same` (to four digits), or empty if undecidable."""
        if self.a is None or self.b is None or self.higher_is_better is None:
            return ""
        if abs(self.b - self.a) <= 1e-4 * abs(self.a):
            return "same"
        return "better" if (self.b > self.a) == self.higher_is_better else "worse"


def compare(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[Compared]:
    """Compares two documents of `read_json`: all requests, then the classes that both have."""
    rows = list(_rows("", a["summary"], b["summary"]))
    for name in sorted(a["classes"].keys() & b["classes"].keys()):
        if len(a["classes"]) > 1 or len(b["classes"]) > 1:
            rows += _rows(f"{name}: ", a["classes"][name], b["classes"][name])
    return rows


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Differences in model, address, window and settings, as `rate: 1.0, 2.0`."""
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
    for name, shares in zip(("refused", "failed"), zip(_lost(a), _lost(b), strict=True), strict=True):
        yield Compared(f"{prefix}{name} (share)", *shares, False)


def _lost(summary: Mapping[str, Any]) -> tuple[float, float]:
    """The shares of refused and of failed requests; a failed one was neither refused nor served."""
    requests, refused = summary["requests"], summary["refusals"]["count"]
    return refused / requests, (requests - summary["statuses"].get(OK, 0) - refused) / requests
