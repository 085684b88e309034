"""Picks the prompts of a prefill step: the most urgent one, in chunks, and others with it where that is little work.

All first tokens of a step come at its end. So a step takes less urgent prompts only as far as its fixed cost would
weigh too much otherwise: where computing dominates, two prompts in turn are both computed no later than in one step. A
more urgent prompt goes first from the next step on. Chunks, after which it can, are short where the prompt under way is
late anyway.

A prompt that is alone ends in a short step: only the blocks of its last step must move after the first token, and all
blocks before them move while that step computes.
"""

from __future__ import annotations

from collections.abc import Callable

from baton.cost import StepCost
from baton.engine.api import Sequence, Work
from baton.spec import AttemptKey

LAST_TOKENS = 64
"""The last step of a prompt that is alone: four blocks, which any transport moves in a millisecond or two."""
WORTH = 4
"""A last chunk of less than WORTH * LAST_TOKENS is not cut: it would cost more than it saves."""


class PrefillScheduler:
    """A `baton.worker.runner.Scheduler`. A sequence leaves as soon as its first token is drawn."""

    def __init__(self, chunk_tokens: int, cost: Callable[[], StepCost] = StepCost) -> None:
        """`chunk_tokens` bounds the tokens of one step, and so how long a cancel or an urgent prompt waits. While the
        cost is unknown, each step takes so many."""
        self._chunk_tokens, self._cost = chunk_tokens, cost
        self._sequences: dict[AttemptKey, tuple[Sequence, int]] = {}
        self._ending: AttemptKey | None = None  # its next step is its last

    def add(self, sequence: Sequence) -> None:
        """Its known tokens are the prompt, after which one token is drawn."""
        self._sequences[sequence.key] = (sequence, len(sequence.tokens))
        ordered = sorted(self._sequences.items(), key=lambda entry: entry[1][0].rank)  # stable: ties by arrival
        self._sequences = dict(ordered)

    def remove(self, key: AttemptKey) -> None:
        self._sequences.pop(key, None)

    def pick(self) -> list[Work]:
        """At most `chunk_tokens` tokens, in order of rank."""
        self._drop_computed()
        first = next((sequence for sequence, _ in self._sequences.values()), None)
        if first is not None and first.key == self._ending:
            return [Work(first, first.remaining)]
        if first is not None and len(self._sequences) == 1 and self._is_worth_cutting(first) and not first.late:
            self._ending = first.key
            return [Work(first, first.remaining - LAST_TOKENS)]
        batch: list[Work] = []
        budget = self._budget()
        for sequence, _ in self._sequences.values():
            if budget == 0:
                break
            count = min(sequence.remaining, budget)
            batch.append(Work(sequence, count))
            budget -= count
        return batch

    def _is_worth_cutting(self, sequence: Sequence) -> bool:
        return WORTH * LAST_TOKENS <= sequence.remaining <= self._chunk_tokens

    def _budget(self) -> int:
        cost, first = self._cost(), next(iter(self._sequences.values()), None)
        if first is None:
            return 0
        most = cost.making_way(self._chunk_tokens) if first[0].late else self._chunk_tokens
        return min(most, max(cost.worth_computing(cost.chunk, most), first[0].remaining))

    def _drop_computed(self) -> None:
        """Steps complete prompts from the front, apart from short ones behind a long one that were batched with it."""
        for key in [key for key, (sequence, prompt) in self._sequences.items() if sequence.computed >= prompt]:
            del self._sequences[key]
