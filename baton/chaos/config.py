"""The settings of a chaos run; `baton chaos` derives its flags and their help from them.

A bad value raises ConfigError with the field's name.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from baton.config import (
    EngineChoice,
    PathChoice,
    TransportChoice,
    require,
    require_at_least,
    require_choice,
    require_positive,
)
from baton.launch.cluster import ClusterConfig

LONGEST_MINUTES = 60.0
"""Every stream is kept in memory until the verdict."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChaosConfig:
    """What is harmed, for how long, and by which plan."""

    seed: int = 0
    """Requests and events are drawn from this: the same seed makes the same plan."""
    minutes: float = 0.5
    """How long harm is done. The undisturbed run before it and the recount after it come on top."""
    engine: EngineChoice = "simulated"
    """simulated: tokens are a function of seed and position; model: the embedded model computes them."""
    deterministic: bool = False
    """Needed with --engine model, where only equal bits make a stream that goes on elsewhere the same."""
    prefill: int = 3
    """Prefill workers; one is always left alone."""
    decode: int = 3
    """Decode workers; one is always left alone."""
    path: PathChoice = "adaptive"
    """As of `baton up`."""
    transport: TransportChoice = "auto"
    """As of `baton up`."""
    log: Path | None = None
    """Write the processes' logs to this file; without it they are dropped."""

    def __post_init__(self) -> None:
        require_choice("engine", self.engine, EngineChoice)
        require_at_least(self, 0, "seed")
        require_at_least(self, 2, "prefill", "decode")
        require_positive(self, "minutes")
        require(
            self.minutes <= LONGEST_MINUTES, "minutes", f"must be at most {LONGEST_MINUTES:g}, not {self.minutes:g}"
        )
        equal = self.engine == "simulated" or self.deterministic
        require(equal, "deterministic", "needed with --engine model: elsewhere a stream that goes on may differ")
        folder = self.log is None or self.log.absolute().parent.is_dir()
        require(folder, "log", f"there is no folder for {self.log}")
        self.cluster()

    @property
    def scale(self) -> Scale:
        return SCALES[self.engine]

    def cluster(self) -> ClusterConfig:
        """The cluster to harm. Raises ConfigError for settings that it can't have."""
        return ClusterConfig(
            listen="127.0.0.1:0",
            log_level="info",  # the router's failovers are read from its log
            log_format="json",
            prefill=self.prefill,
            decode=self.decode,
            path=self.path,
            transport=self.transport,
            deterministic=self.deterministic,
            **self.scale.cluster,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """A load and its harm, as large as an engine can bear on two cores. Lengths are in tokens: (least, most)."""

    at_once: int
    """Streams under way."""
    requests_a_minute: int
    """Different requests in the plan, for each minute of harm; `fewest_requests` at least."""
    fewest_requests: int
    vocabulary: int
    """Prompts are drawn from the ids below."""
    prefixes: tuple[int, ...]
    """Lengths of the beginnings that prompts share."""
    prompt: tuple[int, int]
    """What follows the prefix."""
    output: tuple[int, int]
    stops: tuple[str, ...]
    """Texts that end some outputs early."""
    every_s: float
    """Seconds between two events of a kind."""
    stream_s: float
    """A stream that takes longer hangs."""
    cluster: dict[str, Any]
    """Further settings of the cluster."""


SCALES = {
    "simulated": Scale(
        at_once=32,
        requests_a_minute=48,
        fewest_requests=32,
        vocabulary=256,
        prefixes=(0, 16, 40, 96),
        prompt=(8, 240),
        output=(120, 260),
        stops=("k", "Q", "#"),
        every_s=3.0,
        stream_s=60.0,
        cluster={"engine": "simulated", "model": "bytes", "sim_speed": 1.0, "pool_tokens": 12_288, "chunk_tokens": 128},
    ),
    "model": Scale(
        at_once=10,
        requests_a_minute=12,
        fewest_requests=20,
        vocabulary=49_000,
        prefixes=(0, 16, 40),
        prompt=(8, 160),
        output=(120, 260),
        stops=(" the", "\n\n", "ing"),
        every_s=6.0,
        stream_s=180.0,
        cluster={"engine": "model", "weights": "int8", "pool_tokens": 8_192, "chunk_tokens": 128, "start_s": 120.0},
    ),
}
