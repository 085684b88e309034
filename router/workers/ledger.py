"""The load that this router has placed on each worker, combined with the workers' own reports.

A report is a little old and lacks the newest placements. So each ledger keeps its own books by attempt, and of the
last report only the excess over them: other routers' work, and growth.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable
from dataclasses import dataclass

from baton.spec import AttemptKey
from router.placement.snapshot import Demand, Queued

NEARLY_DONE = 0.1
"""The least share of a prompt's predicted work that is assumed to be left."""


@dataclass(slots=True)
class _Prompt:
    tokens: int
    queued: Queued
    left_s: float
    computing: bool = False


class PrefillLedger:
    """Prompts placed on a worker and not computed yet: their tokens, and their work in order of rank.

    A worker computes one prompt at a time, the most urgent of those that it has started: the time between two calls
    counts for that one.
    """

    def __init__(self, changed: Callable[[], None] = lambda: None) -> None:
        """`changed` is called after each change of the placed work."""
        self._changed = changed
        self._prompts: dict[AttemptKey, _Prompt] = {}
        self._order: list[tuple[float, AttemptKey]] = []
        self._total = 0
        self._foreign = 0
        self.queued_tokens = 0
        """Ours, and the excess in the worker's last report."""
        self.work_s = 0.0
        """Predicted seconds of all prompts that are not computed yet; an upper bound of the work that is left."""
        self._at = 0.0

    def __len__(self) -> int:
        return len(self._prompts)

    def place(self, attempt: AttemptKey, tokens: int, queued: Queued | None = None) -> None:
        """A prompt is on its way to the worker; `queued` where its work can be predicted."""
        assert attempt not in self._prompts, "an attempt is placed once"
        known = queued or Queued(0.0, 0.0)
        self._prompts[attempt] = _Prompt(tokens, known, known.seconds)
        bisect.insort(self._order, (known.rank, attempt))
        self._count(tokens)
        self.work_s += known.seconds

    def started(self, attempt: AttemptKey, now: float) -> None:
        """The worker computes the prompt from now on."""
        prompt = self._prompts.get(attempt)
        if prompt is not None and not prompt.computing:
            self._pass(now)
            prompt.computing = True

    def release(self, attempt: AttemptKey, now: float) -> None:
        """The prompt is computed, or given up. Idempotent."""
        if attempt not in self._prompts:
            return
        self._pass(now)
        prompt = self._prompts.pop(attempt)
        self._count(-prompt.tokens)
        self.work_s = self.work_s - prompt.queued.seconds if self._prompts else 0.0
        del self._order[bisect.bisect_left(self._order, (prompt.queued.rank, attempt))]

    def queue(self, now: float) -> list[Queued]:
        """The work that is left, in order of rank. A prompt that takes longer than predicted counts as nearly done."""
        self._pass(now)
        found, under_way = [], True
        for _, attempt in self._order:
            prompt = self._prompts[attempt]
            rank, seconds, due_at, chunk_s = prompt.queued
            if prompt.computing:  # it has started, so its latest start no longer matters
                under_way_s = _left_of_chunk(seconds, prompt.left_s, chunk_s) if under_way else 0.0
                found.append(Queued(rank, prompt.left_s, None, under_way_s))
                under_way = False
            else:
                found.append(Queued(rank, seconds, due_at))
        return found

    def reported(self, waiting_tokens: int) -> None:
        self._foreign = max(0, waiting_tokens - self._total)
        self._count(0)

    def check_integrity(self) -> None:
        """The total is the sum of its parts, and each prompt has its place in the order."""
        assert self._total == sum(prompt.tokens for prompt in self._prompts.values())
        assert self.queued_tokens == self._total + self._foreign
        assert sorted(attempt for _, attempt in self._order) == sorted(self._prompts)

    def _count(self, tokens: int) -> None:
        self._total += tokens
        self.queued_tokens = self._total + self._foreign
        self._changed()

    def _pass(self, now: float) -> None:
        """Counts the time since the last call for the prompt that was computed in it."""
        passed, self._at = now - self._at, now
        for _, attempt in self._order:
            first = self._prompts[attempt]
            if first.computing:
                first.left_s = max(first.left_s - passed, NEARLY_DONE * first.queued.seconds)
                break


def _left_of_chunk(seconds: float, left_s: float, chunk_s: float) -> float:
    """Seconds left of the current chunk, of a prompt of `seconds` in chunks of `chunk_s`."""
    done = seconds - left_s
    return min(left_s, chunk_s - done % chunk_s) if chunk_s > 0 else left_s


class DecodeLedger:
    """Sequences bound to a decode worker: their likely blocks, and the tokens known when they were bound.

    Bound blocks count as taken until a report that came after the sequence was resident, which surely includes them.
    """

    def __init__(self, capacity_blocks: int, changed: Callable[[], None] = lambda: None) -> None:
        """`changed` is called after each change of the bound or reported work."""
        self._changed = changed
        self._capacity = capacity_blocks
        self._demands: dict[AttemptKey, Demand] = {}
        self._objectives: dict[AttemptKey, float] = {}
        self._unreported: dict[AttemptKey, bool] = {}  # -> resident already
        self._unreported_blocks = 0
        self._total_blocks = 0
        self._total_tokens = 0
        self._beyond = 0
        self.tokens = 0
        """In the worker's KV: those of bound prompts, and the excess in the last report."""
        self.strictest_s: float | None = None
        """The least objective per token of the bound sequences, in seconds."""
        self._reported_free: int | None = None

    def __len__(self) -> int:
        return len(self._demands)

    @property
    def free_blocks(self) -> int:
        """Blocks that are neither held nor promised; may be negative for a moment."""
        if self._reported_free is None:
            return self._capacity - self._total_blocks
        return self._reported_free - self._unreported_blocks

    @property
    def mean_blocks(self) -> float:
        """Per bound sequence; 0 without any."""
        return self._total_blocks / len(self._demands) if self._demands else 0.0

    def bind(self, attempt: AttemptKey, demand: Demand, tpot_s: float | None = None) -> None:
        """`tpot_s` is the sequence's objective per token."""
        assert attempt not in self._demands, "an attempt is bound to one worker at a time"
        self._demands[attempt] = demand
        if tpot_s is not None:
            self._objectives[attempt] = tpot_s
            self.strictest_s = tpot_s if self.strictest_s is None else min(self.strictest_s, tpot_s)
        self._unreported[attempt] = False
        self._unreported_blocks += demand.blocks
        self._total_blocks += demand.blocks
        self._count(demand.tokens)

    def resident(self, attempt: AttemptKey) -> None:
        """The sequence has arrived: the next report includes it."""
        if attempt in self._unreported:
            self._unreported[attempt] = True

    def release(self, attempt: AttemptKey) -> None:
        """The sequence is over, or went elsewhere. Idempotent."""
        demand = self._demands.pop(attempt, None)
        if demand is None:
            return
        if self._objectives.pop(attempt, None) == self.strictest_s:
            self.strictest_s = min(self._objectives.values(), default=None)
        self._total_blocks -= demand.blocks
        self._count(-demand.tokens)
        if self._unreported.pop(attempt, None) is not None:
            self._unreported_blocks -= demand.blocks

    def reported(self, free_blocks: int, resident_tokens: int) -> None:
        """`free_blocks` includes blocks that can be evicted, and those granted to sequences not resident yet; not those
        that residents will likely take."""
        self._reported_free = free_blocks
        for attempt in [attempt for attempt, resident in self._unreported.items() if resident]:
            del self._unreported[attempt]
            self._unreported_blocks -= self._demands[attempt].blocks
        expected = self._total_tokens - sum(self._demands[attempt].tokens for attempt in self._unreported)
        self._beyond = max(0, resident_tokens - expected)
        self._count(0)

    def _count(self, tokens: int) -> None:
        self._total_tokens += tokens
        self.tokens = self._total_tokens + self._beyond
        self._changed()

    def check_integrity(self) -> None:
        assert self.tokens == self._total_tokens + self._beyond
        assert self._objectives.keys() <= self._demands.keys()
        assert self.strictest_s == min(self._objectives.values(), default=None)
        assert self._total_blocks == sum(demand.blocks for demand in self._demands.values())
        assert self._total_tokens == sum(demand.tokens for demand in self._demands.values())
        assert self._unreported_blocks == sum(self._demands[attempt].blocks for attempt in self._unreported)
