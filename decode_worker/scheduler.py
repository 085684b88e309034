"""Which sequences a decode step works on: all residents, one token each (continuous batching)."""

from __future__ import annotations

from baton.engine.api import Sequence, Work
from baton.spec import AttemptKey


class DecodeScheduler:
    """Implements `baton.engine.runner.Scheduler`. Admission bounds the residents, so none ever waits for a turn."""

    def __init__(self) -> None:
        self._sequences: dict[AttemptKey, Sequence] = {}

    def add(self, sequence: Sequence) -> None:
        """Joins from the next step on; all but its last token have their KV."""
        self._sequences[sequence.key] = sequence

    def remove(self, key: AttemptKey) -> None:
        """See `Scheduler`."""
        self._sequences.pop(key, None)

    def pick(self) -> list[Work]:
        """Every resident; what is left to compute of it is its last token."""
        return [Work(sequence, sequence.remaining) for sequence in self._sequences.values()]
