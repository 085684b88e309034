"""Prompts that wait for their turn: the one that is due first (earliest deadline first, which keeps all objectives on
one machine where any order does: Liu and Layland, J. ACM 20:46).

A prompt's rank is when its first token is due; it does not change while it waits, so the order needs no clock, and of
prompts with equal objectives none overtakes another, whatever their lengths: what was promised to the first holds. A
step of priority is worth `PRIORITY_S`. Nobody starves:

- a prompt without an objective is due `AGEING_S` after it came, so that it is overtaken for no longer;
- one without the slack to be in time any more makes way for those that have it, for another `AGEING_S` and once.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from baton.spec import AttemptKey, SequenceSpec

AGEING_S = 10.0
PRIORITY_S = 1.0
SLACK = 64
"""Entries of prompts that left early, beyond as many as still wait, before they are swept out."""


class Waiting(Protocol):
    """A prompt that can wait. `rank`, `work_s` and `late` are the queue's; `received_at` is monotonic seconds."""

    rank: float
    work_s: float
    late: bool
    received_at: float

    @property
    def key(self) -> AttemptKey:
        """Of its prompt."""

    @property
    def spec(self) -> SequenceSpec:
        """What it is."""


W = TypeVar("W", bound=Waiting)


class PromptQueue(Generic[W]):
    """A heap with lazy deletion; what leaves early is skipped when it comes up. Times are monotonic seconds."""

    def __init__(self) -> None:
        self.tokens = 0
        """Tokens of all prompts that wait."""
        self._heap: list[tuple[float, int, W]] = []
        self._waiting: set[AttemptKey] = set()
        self._order = itertools.count()

    def __len__(self) -> int:
        return len(self._waiting)

    def push(self, prompt: W, work_s: float) -> None:
        """Queues a prompt that needs so many seconds of computing."""
        left = prompt.spec.ttft_left_s
        due = prompt.received_at + (AGEING_S if left is None else left)
        prompt.rank, prompt.work_s = due - PRIORITY_S * prompt.spec.priority, work_s
        self._waiting.add(prompt.key)
        self.tokens += prompt.spec.known_tokens
        self._put(prompt)

    def first(self, now: float, ahead_s: Callable[[W], float] = lambda _: 0.0) -> W | None:
        """Whose turn it is; it stays until removed. `ahead_s` is the work that has started and goes before it."""
        while self._heap:
            rank, _, prompt = self._heap[0]
            if prompt.key not in self._waiting:
                heapq.heappop(self._heap)
            elif self._is_late(prompt, rank, now + ahead_s(prompt)):
                heapq.heappop(self._heap)
                prompt.late = True
                prompt.rank += AGEING_S
                self._put(prompt)
            else:
                return prompt
        return None

    def remove(self, prompt: W) -> None:
        """It started, or is over; nothing happens when it does not wait."""
        if prompt.key in self._waiting:
            self._waiting.remove(prompt.key)
            self.tokens -= prompt.spec.known_tokens
            if len(self._heap) > 2 * len(self._waiting) + SLACK:
                self._heap = [entry for entry in self._heap if entry[2].key in self._waiting]
                heapq.heapify(self._heap)

    def _put(self, prompt: W) -> None:
        heapq.heappush(self._heap, (prompt.rank, next(self._order), prompt))

    def _is_late(self, prompt: W, rank: float, start: float) -> bool:
        """Whether it has lost its chance if that is when it starts. Without an objective there is none to lose."""
        if prompt.late or prompt.spec.ttft_left_s is None:
            return False
        return rank + PRIORITY_S * prompt.spec.priority - prompt.work_s < start
