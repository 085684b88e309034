"""Which worker takes a prompt, and which one decodes it: pure functions of a snapshot.

No clock, no I/O, no randomness: the same code runs live, in tests and in a simulator. Each pick returns a Decision
that carries every candidate with its predicted load, so that it can be explained later. Predictions of time come
with the objectives; here a load is a number of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class Demand:
    """What a sequence will hold on a decode worker: blocks for its whole length, and the tokens known now."""

    blocks: int
    tokens: int


class PrefillLoad(NamedTuple):
    """A prefill worker in a snapshot. `queued_tokens` are prompt tokens that it has still to compute."""

    name: str
    queued_tokens: int
    capacity_blocks: int


class DecodeLoad(NamedTuple):
    """A decode worker in a snapshot. `free_blocks` is what nobody holds and nobody was promised."""

    name: str
    tokens: int
    sequences: int
    free_blocks: int
    capacity_blocks: int
    max_sequences: int


class Candidate(NamedTuple):
    """One worker that was looked at. `load` in tokens (prefill) or as a share of the pool (decode)."""

    name: str
    load: float
    feasible: bool
    note: str = ""


@dataclass(frozen=True, slots=True)
class Decision:
    """The worker that was chosen, why, and whom else there was."""

    chosen: str
    reason: str
    candidates: tuple[Candidate, ...]


def pick_prefill(workers: Sequence[PrefillLoad], blocks: int) -> Decision | None:
    """The worker with the least to compute whose pool can hold `blocks`; None when there is no such worker."""
    candidates = tuple(
        Candidate(
            worker.name,
            worker.queued_tokens,
            worker.capacity_blocks >= blocks,
            "" if worker.capacity_blocks >= blocks else f"its pool has {worker.capacity_blocks} blocks",
        )
        for worker in workers
    )
    best = min(
        (candidate for candidate in candidates if candidate.feasible),
        key=lambda candidate: (candidate.load, candidate.name),
        default=None,
    )
    if best is None:
        return None
    return Decision(best.name, f"least to compute: {best.load:.0f} tokens", candidates)


def pick_decode(
    workers: Sequence[DecodeLoad], demand: Demand, exclude: Set[str] = frozenset(), avoid: str = ""
) -> Decision | None:
    """The least loaded worker, those first that have room for the whole sequence now.

    A worker without room may still be chosen: it refuses, and the prompt waits for it. `exclude` are out of the
    question; `avoid` is the one that just refused, taken only when there is no other. None when nobody is left.
    """
    candidates, best, best_key = [], None, None
    for worker in workers:
        note = _obstacle(worker, demand, exclude)
        room = not note and has_room(worker, demand)
        load = (worker.tokens + demand.tokens) / worker.capacity_blocks
        candidates.append(Candidate(worker.name, load, room, note if note or room else "no room now"))
        key = (worker.name == avoid, not room, load, worker.sequences, worker.name)
        if not note and (best_key is None or key < best_key):
            best, best_key = worker, key
    if best is None:
        return None
    reason = "least loaded with room" if has_room(best, demand) else "least loaded; none has room"
    return Decision(best.name, reason, tuple(candidates))


def has_room(worker: DecodeLoad, demand: Demand) -> bool:
    """Whether the whole sequence would fit at once."""
    return worker.free_blocks >= demand.blocks and worker.sequences < worker.max_sequences


def _obstacle(worker: DecodeLoad, demand: Demand, exclude: Set[str]) -> str:
    """Why the worker is out of the question; empty when it is not."""
    if worker.name in exclude:
        return "excluded"
    return "" if worker.capacity_blocks >= demand.blocks else f"its pool has {worker.capacity_blocks} blocks"
