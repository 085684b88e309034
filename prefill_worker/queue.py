"""Prompts that wait for their turn: higher priority first, then first come, first served."""

from __future__ import annotations

import heapq
import itertools

from baton.spec import AttemptKey
from prefill_worker.attempt import Attempt

SLACK = 64
"""Entries of prompts that left early, beyond as many as still wait, before they are swept out."""


class PromptQueue:
    """A heap with lazy deletion; what leaves early is skipped when it comes up."""

    def __init__(self) -> None:
        self.tokens = 0
        """Tokens of all prompts that wait."""
        self._heap: list[tuple[int, int, Attempt]] = []
        self._waiting: set[AttemptKey] = set()
        self._order = itertools.count()

    def __len__(self) -> int:
        return len(self._waiting)

    def push(self, attempt: Attempt) -> None:
        """Queues a prompt behind those of its priority."""
        self._waiting.add(attempt.key)
        self.tokens += attempt.spec.known_tokens
        heapq.heappush(self._heap, (-attempt.spec.priority, next(self._order), attempt))

    def first(self) -> Attempt | None:
        """Whose turn it is; it stays until removed."""
        while self._heap and self._heap[0][2].key not in self._waiting:
            heapq.heappop(self._heap)
        return self._heap[0][2] if self._heap else None

    def remove(self, attempt: Attempt) -> None:
        """It started, or is over; nothing happens when it does not wait."""
        if attempt.key in self._waiting:
            self._waiting.remove(attempt.key)
            self.tokens -= attempt.spec.known_tokens
            if len(self._heap) > 2 * len(self._waiting) + SLACK:
                self._heap = [entry for entry in self._heap if entry[2].key in self._waiting]
                heapq.heapify(self._heap)
