"""The settings of a load; `baton bench` derives its flags and their help from them.

A bad value raises ConfigError with the field's name.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Literal

from baton.bench.schedule.classes import TrafficClass, parse_classes
from baton.bench.schedule.lengths import parse_lengths
from baton.client.types import WhenUnmet
from baton.config import require
from baton.errors import ConfigError

Arrivals = Literal["auto", "steady", "onoff", "steps", "trace"]
TraceFormat = Literal["auto", "azure", "mooncake"]
DEFAULT_RATE = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadConfig:
    """A load: its schedule, lengths, classes, and the client's own limits."""

    model: str = ""
    """A model from `baton models`; may be left out when there is only one."""
    arrivals: Arrivals = "auto"
    """steady, onoff (bursts), steps, trace (its own times); auto: trace when one is given, else steady."""
    rate: float | None = None
    """Mean requests per second. Default: 1, and a trace's own with its own times."""
    burstiness: float = 1.0
    """Variance of the gaps over their squared mean: 0 is even, 1 Poisson, more is gamma with that burstiness."""
    on_s: float = 2.0
    """With onoff: the seconds of a burst."""
    off_s: float = 8.0
    """With onoff: the seconds between bursts, without any arrival."""
    steps: str = ""
    """With steps: RATE:SECONDS,RATE:SECONDS,... one after the other."""
    trace: Path | None = None
    """A file with lengths and times: Azure's CSV or Mooncake's JSONL."""
    trace_format: TraceFormat = "auto"
    """azure, mooncake, or auto: by the file's name (.csv, .jsonl)."""
    length_scale: float = 1.0
    """Multiplies the trace's lengths."""
    time_scale: float = 1.0
    """Multiplies the trace's times: 2 is half as fast."""
    prompt_tokens: str = "128"
    """Without a trace: N, uniform:LOW:HIGH or lognormal:MEDIAN:SIGMA[:MAX]."""
    output_tokens: str = "32"
    """Without a trace: likewise."""
    seconds: float = 30.0
    """How long requests are sent; a trace may end earlier."""
    requests: int | None = None
    """Send at most this many."""
    warmup_s: float = 0.0
    """Requests due in the first seconds are sent and not counted."""
    seed: int = 0
    """Everything that is drawn, is drawn from this."""
    slo: str = ""
    """Objectives of every request: ttft_ms=N,tpot_ms=N."""
    classes: list[str] = field(default_factory=list)
    """NAME:WEIGHT:ttft_ms=N,tpot_ms=N,priority=N,when_unmet=...; may be given several times."""
    when_unmet: WhenUnmet | None = None
    """What the server is to do when the objectives can't be met."""
    ignore_eos: bool = True
    """Answers have exactly the length that was drawn."""
    channels: int = 4
    """Connections, however many requests are under way."""
    timeout_s: float = 120.0
    """Each request's deadline; more than a week counts as a week."""
    max_late_ms: float = 50.0
    """The result is invalid when this client was later than that with 1 % of its work."""

    def __post_init__(self) -> None:
        for name in ("on_s", "time_scale", "length_scale", "seconds", "timeout_s", "max_late_ms"):
            value = getattr(self, name)
            require(value > 0 and isfinite(value), name, f"must be positive, not {value:g}")
        for name in ("off_s", "warmup_s", "burstiness"):
            value = getattr(self, name)
            require(value >= 0 and isfinite(value), name, f"at least 0, not {value:g}")
        require(self.rate is None or 0 < self.rate < 1e6, "rate", f"must be positive, not {self.rate}")
        require(self.requests is None or self.requests >= 1, "requests", f"at least 1, not {self.requests}")
        require(0 <= self.seed < 2**32, "seed", f"from 0 to 2^32 - 1, not {self.seed}")
        require(1 <= self.channels <= 256, "channels", f"1 to 256, not {self.channels}")
        require(self.warmup_s < self.seconds, "warmup_s", f"less than the {self.seconds:g} s of --seconds")
        kind = self.arrival_kind
        require(kind != "trace" or self.trace is not None, "trace", "which file? --arrivals trace takes its times")
        require(bool(self.steps) == (kind == "steps"), "steps", "goes with --arrivals steps, and that with it")
        require(kind != "steps" or self.rate is None, "rate", "each of --steps has its own")
        self.step_list()
        parse_lengths(self.prompt_tokens, "prompt_tokens")
        parse_lengths(self.output_tokens, "output_tokens")
        self.traffic_classes()

    @property
    def arrival_kind(self) -> Arrivals:
        """`arrivals`, with auto resolved."""
        if self.arrivals != "auto":
            return self.arrivals
        return "trace" if self.trace is not None else "steady"

    def traffic_classes(self) -> tuple[TrafficClass, ...]:
        return parse_classes(self.slo, self.classes, self.when_unmet)

    def step_list(self) -> tuple[tuple[float, float], ...]:
        """(seconds, rate) of each step."""
        return tuple(_step(entry) for entry in filter(None, self.steps.split(",")))


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepConfig:
    """A sweep's goal and its precision."""

    attainment: float = 0.9
    """With --sweep: the share of requests that must keep their objectives."""
    tolerance: float = 0.05
    """With --sweep: how closely to find the rate; 0.05 is to within 5 %."""

    def __post_init__(self) -> None:
        require(0 < self.attainment <= 1, "attainment", f"above 0, at most 1, not {self.attainment:g}")
        require(0 < self.tolerance < 1, "tolerance", f"between 0 and 1, not {self.tolerance:g}")


def _step(text: str) -> tuple[float, float]:
    rate, _, seconds = text.partition(":")
    try:
        found = float(seconds), float(rate)
    except ValueError:
        found = 0.0, 0.0
    if not (found[0] > 0 and isfinite(found[0]) and 0 <= found[1] < 1e6):
        raise ConfigError(f"steps: expected RATE:SECONDS,..., not {text!r}")
    return found
