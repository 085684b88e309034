"""What placement sees: the workers at one moment, and what a request asks. Plain values; times in seconds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from baton.cost import HANDOFF_S, StepCost


@dataclass(frozen=True, slots=True)
class Demand:
    """What a sequence will hold on a decode worker: blocks for its whole length, and the tokens known now."""

    blocks: int
    tokens: int


class Queued(NamedTuple):
    """A prompt at a worker: its place in the order (`rank`), and the work that is left of it. `due_at` is when its
    first token is due, on the router's clock, and None where that can't be missed any more or there is no objective.
    `chunk_s` is how long a more urgent prompt may have to wait for it: one chunk, or what is left of the one under way;
    0 while it waits itself."""

    rank: float
    seconds: float
    due_at: float | None = None
    chunk_s: float = 0.0


class PrefillLoad(NamedTuple):
    """A prefill worker in a snapshot. `queued_tokens` are prompt tokens that it has still to compute.

    `queue` is in order of rank; `cached_tokens` are those of the request in question; `promise` is what a predicted
    time is multiplied with to be kept; `chosen_at` is when a prompt last went there. Without a `cost` no time can be
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
    """A decode worker in a snapshot. `free_blocks` is what nobody holds and nobody was promised.

    `strictest_s` is the least objective per token among the sequences bound to it, of those that could be kept then;
    None without any. `queue` are prompts that it computes itself, `mean_tokens` what its sequences hold or will.
    `handoff_s` is how long after its first token a sequence that comes in is there.
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
    """A request that is to be placed at `now`. Objectives are None where there are none; `ttft_s` is what is left.

    `unbound` are sequences admitted before that no decode worker has yet, with their tokens: the share of one worker,
    which need not be whole. `gaps` are those between the tokens that it asks for at the most.
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
        """There is nothing to decode."""
        return self.gaps == 0
