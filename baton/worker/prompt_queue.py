"""Prompts in the order in which they start: earliest deadline first, which keeps all objectives on one machine where
any order does (Liu and Layland, J. ACM 20:46).

A prompt's rank is when its first token is due. The rank does not change while the prompt waits, so the order needs no
clock, and prompts with equal objectives start in the order of their arrival. A step of priority is worth `PRIORITY_S`.
No prompt starves:

- A prompt without an objective is due `AGEING_S` after it came.
- A prompt that can't be in time any more makes way for those that can, once, for another `AGEING_S`.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterator
from typing import Generic, Protocol, TypeVar

from baton.spec import AttemptKey, SequenceSpec

AGEING_S = 10.0
PRIORITY_S = 1.0
SLACK = 64
"""The heap is rebuilt when it has so many entries more than twice the waiting prompts."""


class Waiting(Protocol):
    """A prompt that can wait. `rank`, `work_s` and `late` are the queue's; `received_at` is monotonic seconds."""

    rank: float
    work_s: float
    late: bool
    received_at: float

    @property
    def key(self) -> AttemptKey: ...

    @property
    def spec(self) -> SequenceSpec: ...


W = TypeVar("W", bound=Waiting)


class PromptQueue(Generic[W]):
    """A heap with lazy deletion. Times are monotonic seconds."""

    def __init__(self) -> None:
        self.tokens = 0
        self._heap: list[tuple[float, int, W]] = []
        self._waiting: dict[AttemptKey, W] = {}
        self._order = itertools.count()

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[W]:
        return iter(self._waiting.values())

    def __contains__(self, key: AttemptKey) -> bool:
        return key in self._waiting

    def push(self, prompt: W, work_s: float) -> None:
        """`work_s`: the seconds of computing that the prompt needs."""
        left = prompt.spec.ttft_left_s
        due = prompt.received_at + (AGEING_S if left is None else left)
        prompt.rank, prompt.work_s = due - PRIORITY_S * prompt.spec.priority, work_s
        self._waiting[prompt.key] = prompt
        self.tokens += prompt.spec.known_tokens
        self._put(prompt)

    def first(self, now: float, ahead_s: Callable[[W], float] = lambda _: 0.0) -> W | None:
        """The prompt whose turn it is; it stays until removed. `ahead_s` is the started work that goes before it."""
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

    def remove(self, key: AttemptKey) -> bool:
        """False when the prompt does not wait."""
        prompt = self._waiting.pop(key, None)
        if prompt is None:
            return False
        self.tokens -= prompt.spec.known_tokens
        if len(self._heap) > 2 * len(self._waiting) + SLACK:
            self._heap = [entry for entry in self._heap if entry[2].key in self._waiting]
            heapq.heapify(self._heap)
        return True

    def _put(self, prompt: W) -> None:
        heapq.heappush(self._heap, (prompt.rank, next(self._order), prompt))

    def _is_late(self, prompt: W, rank: float, start: float) -> bool:
        """Whether a prompt that starts at `start` misses its objective; false where it has none."""
        if prompt.late or prompt.spec.ttft_left_s is None:
            return False
        return rank + PRIORITY_S * prompt.spec.priority - prompt.work_s < start
