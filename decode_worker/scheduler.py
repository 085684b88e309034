"""Picks the sequences of a decode step: all residents but those that are paused or lack a block, one token each
(continuous batching), and chunks of the prompts that are computed here, as large as the residents' objectives allow.

Every resident waits for a chunk, so a chunk gets what the strictest of their objectives leaves of a step: then none is
missed, however long the prompt. This is stall-free batching (Sarathi-Serve, arXiv 2403.02310) with a budget in time,
from the worker's own cost, in place of a number of tokens. An objective is for the mean: a resident that is behind, as
after a handoff in the middle of a long step, gets shorter steps until it has caught up, unless it can't any more.
Without residents, one may arrive before the chunk ends: then the prompts' own objectives count. A sequence that is on
its way, with few tokens to make up for a wait, gets chunks that end in time.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

from baton.cost import HANDOFF_S, LEAST_CHUNK, MARGIN, StepCost
from baton.engine.api import Sequence, Work
from baton.model import BLOCK_TOKENS
from baton.spec import AttemptKey


class Expected(NamedTuple):
    """A sequence on its way here: at most so many gaps between its tokens, and its objective for their mean."""

    gaps: int
    tpot_s: float


class DecodeScheduler:
    """A `baton.worker.runner.Scheduler`. Slots bound the residents, so none ever waits for a turn."""

    def __init__(
        self,
        chunk_tokens: int = 512,
        cost: Callable[[], StepCost] = StepCost,
        tpot_budget_s: float | None = None,
        clock: Callable[[], float] = time.monotonic,
        block_tokens: int = BLOCK_TOKENS,
    ) -> None:
        """`tpot_budget_s` bounds every step with residents, whatever their objectives are."""
        self._block_tokens, self._chunk_tokens, self._cost = block_tokens, chunk_tokens, cost
        self._budget_s, self._clock = tpot_budget_s, clock
        self._residents: dict[AttemptKey, Sequence] = {}
        self._at_first: dict[AttemptKey, int] = {}  # a resident's output tokens at `first_token_at`
        self._prompts: dict[AttemptKey, Sequence] = {}
        self.expected: tuple[Expected, ...] = ()
        """Replaced as a whole, from any thread."""
        self.handoff_s = HANDOFF_S
        """The time from first token to resident. Set from any thread."""
        self.paused: frozenset[AttemptKey] = frozenset()
        """Residents that are left out. Replaced as a whole, from any thread."""
        self.stalls = 0
        """How often a resident was left out because its next position had no block. May be read from any thread."""
        self._stalled: frozenset[AttemptKey] = frozenset()
        self._left_out_since: dict[AttemptKey, float] = {}

    def add(self, sequence: Sequence) -> None:
        """The sequence joins from the next step on: as a prompt, until its first token is drawn."""
        if self._is_computed(sequence):
            self._settle(sequence)
            return
        self._prompts[sequence.key] = sequence
        self._prompts = dict(sorted(self._prompts.items(), key=lambda entry: entry[1].rank))  # stable

    def remove(self, key: AttemptKey) -> None:
        self._residents.pop(key, None)
        self._at_first.pop(key, None)
        self._prompts.pop(key, None)
        self._left_out_since.pop(key, None)

    def grow(self, key: AttemptKey, blocks: list[int]) -> None:
        """Appends to a sequence's blocks. Does nothing when the sequence is unknown."""
        if (sequence := self._residents.get(key) or self._prompts.get(key)) is not None:
            sequence.blocks.extend(blocks)

    def pick(self) -> list[Work]:
        """Every resident that is not left out, with its last token, then prompts in order of rank."""
        for key in [key for key, prompt in self._prompts.items() if self._is_computed(prompt)]:
            self._settle(self._prompts.pop(key))
        active = self._active()
        batch = [Work(sequence, sequence.remaining) for sequence in active.values()]
        if not self._prompts:
            return batch
        left = self._chunk(active)
        for prompt in self._prompts.values():
            if left <= 0:
                break
            count = min(prompt.remaining, left)
            batch.append(Work(prompt, count))
            left -= count
        return batch

    def _settle(self, sequence: Sequence) -> None:
        self._residents[sequence.key] = sequence
        self._at_first[sequence.key] = sequence.output_tokens
        if sequence.first_token_at is None:
            sequence.first_token_at = self._clock()

    def _active(self) -> dict[AttemptKey, Sequence]:
        """The residents but those that are paused, or whose next position has no block. Steps that left a resident out
        are no debt: their time does not count."""
        size = self._block_tokens
        short = [key for key, other in self._residents.items() if len(other.blocks) * size < len(other.tokens)]
        if not self.paused and not short and not self._left_out_since:
            return self._residents
        stalled = frozenset(short)
        self.stalls += len(stalled - self._stalled)
        self._stalled = stalled
        now, left_out = self._clock(), (self.paused & self._residents.keys()) | stalled
        for key in left_out - self._left_out_since.keys():
            self._left_out_since[key] = now
        for key in self._left_out_since.keys() - left_out:
            resident, since = self._residents[key], self._left_out_since.pop(key)
            resident.first_token_at = (resident.first_token_at or since) + now - since
        return {key: resident for key, resident in self._residents.items() if key not in left_out}

    def _chunk(self, residents: dict[AttemptKey, Sequence]) -> int:
        """Prompt tokens of this step. Residents wait no longer than their objectives allow. The step takes more than
        the first prompt only where its fixed cost would weigh too much otherwise."""
        cost, first = self._cost(), next(iter(self._prompts.values()))
        resident_tokens = sum(len(other.tokens) for other in residents.values())
        if not residents:
            fixed = cost.chunk
            largest = cost.making_way(self._chunk_tokens) if first.late else self._chunk_tokens
            limits = [prompt.tpot_s for prompt in self._prompts.values() if prompt.tpot_s is not None]
            most = cost.fits_alone(self._strictest(limits), first.computed, largest)
        else:
            fixed = cost.decode(len(residents), resident_tokens)
            limit = self._strictest(self._left_s(residents, fixed))
            most = max(LEAST_CHUNK, cost.fits_beside(fixed, limit, first.computed, self._chunk_tokens))
        if self.expected:
            step_s = cost.decode(len(residents) + 1, resident_tokens) + LEAST_CHUNK * cost.per_token
            spare = [gaps * (MARGIN * tpot_s - step_s) - self.handoff_s for gaps, tpot_s in self.expected]
            if in_time := [seconds for seconds in spare if seconds > 0]:
                fits = cost.fits(min(in_time) / cost.mixed - fixed, first.computed, most)
                return min(most, max(LEAST_CHUNK, fits))
        return min(most, max(cost.worth_computing(fixed, most), first.remaining))

    def _left_s(self, residents: dict[AttemptKey, Sequence], alone_s: float) -> list[float]:
        """What each resident's objective leaves for this step: all of it, or less for one that is behind and can still
        catch up by steps of `alone_s`. A resident that can't, and whose objective no step keeps, has no say."""
        now, left = self._clock(), []
        for key, resident in residents.items():
            if resident.tpot_s is None:
                continue
            assert resident.first_token_at is not None, "a resident's steps count from somewhere"
            passed, at_first = now - resident.first_token_at, self._at_first[key]
            done, most = resident.output_tokens - at_first, resident.rule.max_tokens - at_first
            lost = passed + (most - done) * alone_s > most * resident.tpot_s
            if lost and resident.tpot_s <= alone_s:
                continue
            left.append(resident.tpot_s if lost else min(resident.tpot_s, (done + 1) * resident.tpot_s - passed))
        return left

    def _strictest(self, limits: list[float]) -> float | None:
        return min(limits if self._budget_s is None else [*limits, self._budget_s], default=None)

    @staticmethod
    def _is_computed(prompt: Sequence) -> bool:
        return prompt.remaining == 1 and prompt.output_tokens > 0
