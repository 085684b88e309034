"""What the SDK tells of models, workers and placements: mirrors of messages in `proto/baton/v1`.

A field that the server left out is None, never a zero made up here. Durations are in milliseconds.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ModelInfo:
    name: str
    context_tokens: int
    vocabulary_size: int
    fingerprint: str
    prefill_workers: int
    decode_workers: int


@dataclass(frozen=True, slots=True)
class Load:
    """What a worker last reported."""

    waiting: int
    running: int
    waiting_tokens: int
    resident_tokens: int
    free_blocks: int
    cached_blocks: int
    held_blocks: int
    quarantined_blocks: int
    pairs: dict[str, int]
    """Decode workers that a prefill worker is connected to, by the transport between them."""
    pair_notes: dict[str, str]
    """By transport: why a better one could not be used with some decode worker."""


@dataclass(frozen=True, slots=True)
class Predictions:
    """How well first tokens on a worker are predicted: promises made, those that took at most 1.2 times as long, the
    median of |achieved / predicted - 1| among the last 64, and what a prediction is multiplied with to be promised."""

    promised: int
    kept: int
    error: float
    factor: float


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerInfo:
    """A worker as the router sees it."""

    name: str
    incarnation: str
    address: str
    roles: tuple[str, ...]
    model: str
    blocks: int
    max_sequences: int
    transports: tuple[str, ...]
    attached: bool
    lease_left_ms: float
    load: Load
    attempts: int
    predictions: Predictions | None = None
    """None before the first token."""
    handoff_ms: float | None = None
    """What the router expects a handoff to it to take after the first token; None before the first."""
    step_error: float | None = None
    """Mean relative error of the step times that it predicts itself; None before it has told a cost."""


class WorkerList(list[WorkerInfo]):
    """The workers that a router knows. `degraded` says in words what is missing: a line for each model and pool."""

    def __init__(self, workers: Iterable[WorkerInfo], degraded: Iterable[str] = ()) -> None:
        super().__init__(workers)
        self.degraded = tuple(degraded)


@dataclass(frozen=True, slots=True)
class PoolStatus:
    """A worker's block pool; `integrity_error` is empty when its books balance."""

    blocks: int
    free: int
    held: int
    cached: int
    quarantined: int
    integrity_error: str
    bytes: int = 0


@dataclass(frozen=True, slots=True)
class Pair:
    """A decode worker that a prefill worker is connected to; so many `handoffs` are under way. `note` says why a better
    transport could not be used."""

    peer: str
    address: str
    transport: str
    handoffs: int
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessStatus:
    """What one process holds. `pool` is None, `roles` empty and `weight_bytes` 0 on a router."""

    name: str
    incarnation: str
    address: str
    roles: tuple[str, ...]
    pool: PoolStatus | None
    live: dict[str, int]
    counters: dict[str, int]
    resident_bytes: int
    weight_bytes: int = 0
    pairs: tuple[Pair, ...] = ()
    degraded: tuple[str, ...] = ()
    """As in `WorkerList`; empty on a worker."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A worker considered for a request; `note` says what spoke against it. Times are None where none was predicted."""

    worker: str
    way: str
    feasible: bool
    note: str
    load: float
    ttft_ms: float | None = None
    tpot_ms: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """One decision about a request: its `step` is "prompt" or "decode"; `others` candidates are not listed. Where not
    all objectives were expected to be kept (`meets`), `constraint` says what was in the way, and `refused` whether the
    request was turned away for it."""

    step: str
    age_ms: float
    chosen: str
    reason: str
    meets: bool
    constraint: str
    candidates: tuple[Candidate, ...]
    others: int
    ttft_ms: float | None = None
    tpot_ms: float | None = None
    refused: bool = False
