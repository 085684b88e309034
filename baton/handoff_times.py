"""How long handoffs to one decode worker took: what a first gap between tokens is longer for them."""

from __future__ import annotations

from collections import deque

from baton.cost import HANDOFF_S

WINDOW = 64
SHARE = 0.9
"""Of the last `WINDOW` handoffs, those that took no longer than what is expected of the next one."""
PRIOR = (HANDOFF_S,) * 20
"""What a worker begins with. The first handoff to it connects, so that one alone says nothing."""


class HandoffTimes:
    """Seconds from a first token until its sequence is resident, of the last `WINDOW` handoffs."""

    def __init__(self) -> None:
        self._seconds: deque[float] = deque(maxlen=WINDOW)
        self.expected_s = HANDOFF_S
        """What the next one takes, or less, mostly."""

    def __len__(self) -> int:
        return len(self._seconds)

    def observe(self, seconds: float) -> None:
        """One that came to pass; 0 where the sequence was there before its first token."""
        self._seconds.append(seconds)
        ordered = sorted((*self._seconds, *PRIOR[len(self._seconds) :]))
        self.expected_s = ordered[int(SHARE * len(ordered))]
