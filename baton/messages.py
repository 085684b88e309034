"""The messages between a router and its workers, as plain values. `baton.rpc.frames` puts them on the wire."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from baton.cost import StepCost
from baton.errors import BatonError
from baton.spec import AttemptKey, FinishReason, HandoffKey, ProcessRef, RefusalReason, SequenceSpec, TokenLogprobs

# From a router to a worker.


@dataclass(frozen=True, slots=True)
class PrefillCommand:
    """Queue this prompt; its blocks go to the decode worker that a `BindCommand` names."""

    spec: SequenceSpec


@dataclass(frozen=True, slots=True)
class DirectCommand:
    """Queue this prompt at a decode worker, to be computed in place."""

    spec: SequenceSpec


@dataclass(frozen=True, slots=True)
class BindCommand:
    """Hand the attempt's blocks to `decode`, under this key."""

    key: HandoffKey
    decode: ProcessRef


@dataclass(frozen=True, slots=True)
class CancelCommand:
    """Free what the attempt holds and answer `Freed`; an unknown attempt is remembered as cancelled."""

    attempt: AttemptKey
    reason: str


@dataclass(frozen=True, slots=True)
class CacheSyncCommand:
    """Report all prefixes in the pool, then each change, as sync number `sync`."""

    sync: int


Command = PrefillCommand | DirectCommand | BindCommand | CancelCommand | CacheSyncCommand

# From a worker to a router.


@dataclass(frozen=True, slots=True)
class Pulse:
    """A worker's step under way, or its last one, which has no age: what its heartbeats tell while it has sequences."""

    step: int
    age_s: float
    predicted_s: float


@dataclass(frozen=True, slots=True)
class Started:
    """The first chunk is about to be computed, `queue_ms` after the command."""

    attempt: AttemptKey
    queue_ms: float
    cached_tokens: int


class TokenRun(NamedTuple):
    """Consecutive tokens of one sequence; `ids[0]` is at the absolute `position`."""

    attempt: AttemptKey
    position: int
    ids: Sequence[int]
    logprobs: Sequence[TokenLogprobs] = ()


@dataclass(frozen=True, slots=True)
class Tokens:
    """The tokens of one step, of all sequences of one router."""

    runs: Sequence[TokenRun]


@dataclass(frozen=True, slots=True)
class HandoffFailed:
    """The prefill worker still holds the blocks."""

    key: HandoffKey
    reason: RefusalReason
    message: str = ""
    retry_after_s: float | None = None

    @property
    def attempt(self) -> AttemptKey:
        return self.key.attempt


@dataclass(frozen=True, slots=True)
class HandoffWaiting:
    """The decode worker has no room yet; `ahead` sequences go first, which takes about `expected_ms`."""

    key: HandoffKey
    ahead: int
    expected_ms: float

    @property
    def attempt(self) -> AttemptKey:
        return self.key.attempt


@dataclass(frozen=True, slots=True)
class Preempted:
    """The sequence had to make room: it is out of the worker, which has the KV of its first `cached_tokens` still in
    the prefix cache."""

    attempt: AttemptKey
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class HandoffDone:
    """The decode worker owns the sequence now (`Resident` on the wire)."""

    key: HandoffKey

    @property
    def attempt(self) -> AttemptKey:
        return self.key.attempt


@dataclass(frozen=True, slots=True)
class Transfer:
    """The cost of moving the blocks. `exposed_ms` is the part after the first token; None where not measured."""

    transport: str
    ms: float | None
    exposed_ms: float | None
    bytes: int
    blocks: int
    cached_blocks: int


@dataclass(frozen=True, slots=True)
class PrefillReport:
    """The prompt is computed; its blocks are freed, or resident where it was computed in place."""

    attempt: AttemptKey
    queue_ms: float
    prefill_ms: float
    cached_tokens: int
    transfer: Transfer | None = None


@dataclass(frozen=True, slots=True)
class Ended:
    """The sequence is over on this worker, by `reason` or `error`. `output_tokens` counts its whole output."""

    attempt: AttemptKey
    reason: FinishReason | None = None
    error: BatonError | None = None
    output_tokens: int = 0
    first_step_wait_ms: float | None = None
    decode_ms: float | None = None


@dataclass(frozen=True, slots=True)
class Freed:
    """The cancelled attempt holds nothing on this worker any more."""

    attempt: AttemptKey


@dataclass(frozen=True, slots=True)
class LoadReport:
    """`resident_tokens` are in the KV of running sequences; `granted_blocks` are the held blocks of sequences on their
    way; `promised_blocks` are those that running sequences will likely take beyond theirs, and a reserve; `cost_error`
    is the mean relative error of predicted step times; `pairs` counts connected decode workers by transport, and
    `pair_notes` says by transport why a better one could not be used."""

    waiting: int = 0
    running: int = 0
    waiting_tokens: int = 0
    free_blocks: int = 0
    cached_blocks: int = 0
    held_blocks: int = 0
    quarantined_blocks: int = 0
    resident_tokens: int = 0
    granted_blocks: int = 0
    promised_blocks: int = 0
    cost: StepCost | None = None
    cost_error: float = 0.0
    chunk_tokens: int = 0
    pairs: Mapping[str, int] = field(default_factory=dict)
    pair_notes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class CacheUpdate:
    """Block digests that came to the pool or left it; `sequence` counts from 1 within a sync."""

    sync: int
    sequence: int
    inserted: Sequence[bytes]
    evicted: Sequence[bytes]


Event = (
    Started
    | Tokens
    | HandoffFailed
    | HandoffWaiting
    | HandoffDone
    | Preempted
    | PrefillReport
    | Ended
    | Freed
    | LoadReport
    | CacheUpdate
)  # fmt: skip
