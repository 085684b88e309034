"""The input of placement: the workers at one moment, and a request's needs. Plain values; times in seconds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from baton.cost import HANDOFF_S, StepCost


@dataclass(frozen=True, slots=True)
class Demand:
    """A sequence's needs on a decode worker: blocks for its likely length, the tokens known now, and the most blocks
    that it can need (0: as many as are likely)."""

    blocks: int
    tokens: int
    most: int = 0

    @property
    def at_most(self) -> int:
        return max(self.blocks, self.most)


class Queued(NamedTuple):
    """A prompt at a worker: its place in the order (`rank`), and the seconds of work left of it. `due_at` is when its
    first token is due, on the router's clock; None where it is late already or has no objective. `chunk_s` is how long
    a more urgent prompt may have to wait for it: one chunk, or the rest of the one under way; 0 while it waits."""

    rank: float
    seconds: float
    due_at: float | None = None
    chunk_s: float = 0.0


class PrefillLoad(NamedTuple):
    """A prefill worker in a snapshot. `queued_tokens` are prompt tokens that it has still to compute.

    `queue` is in order of rank; `cached_tokens` are those of the request to be placed; `promise` is the factor from a
    predicted time to a promised one; `chosen_at` is when a prompt last went there. Without a `cost` no time can be
    predicted.
    """

    name: str
    queued_tokens: int
    capacity_blocks: int
    cost: StepCost | None = None
    chunk_tokens: int = 512
    queue: Sequence[Queued] = ()
    cached_tokens: int = 0
    promise: float = 1.0
    chosen_at: float = 0.0


class DecodeLoad(NamedTuple):
    """A decode worker in a snapshot. `free_blocks` are neither held nor will sequences there likely
    take them.

    `strictest_s` is the least objective per token among the sequences bound to it, of those that could be kept then;
    None without any. `queue` are prompts that it computes itself, `mean_tokens` the mean length of its sequences.
    `handoff_s` is the time from a sequence's first token to its arrival.
    """

    name: str
    tokens: int
    sequences: int
    free_blocks: int
    capacity_blocks: int
    max_sequences: int
    cost: StepCost | None = None
    chunk_tokens: int = 512
    strictest_s: float | None = None
    queue: Sequence[Queued] = ()
    cached_tokens: int = 0
    promise: float = 1.0
    mean_tokens: float = 0.0
    chosen_at: float = 0.0
    handoff_s: float = HANDOFF_S


class Ask(NamedTuple):
    """A request to be placed at `now`. Objectives are None where there are none; `ttft_s` is the time left.

    `unbound` is one worker's share of the sequences that are admitted and not bound to a decode worker yet,
    `unbound_tokens` that of their tokens; a share need not be whole. `gaps` is the most tokens it asks for, less one.
    """

    now: float
    tokens: int
    demand: Demand
    ttft_s: float | None = None
    tpot_s: float | None = None
    priority: int = 0
    unbound: float = 0.0
    unbound_tokens: float = 0.0
    gaps: int = 1_000_000

    @property
    def single_token(self) -> bool:
        return self.gaps == 0
