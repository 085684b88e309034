"""How well predictions were kept, and the factor that makes a prediction a promise that is mostly kept."""

from __future__ import annotations

import math
from collections import deque

WINDOW = 64
TOLERANCE = 1.2
"""A promise is kept when the first token took at most this factor longer."""
KEPT_SHARE = 0.97
"""The share of the last `WINDOW` prompts whose time a promise covers. The load of the next ones differs: in simulated
time at 3.2 and 4.5/s 90.4 and 89.2 % were kept with 0.95, 91.7 and 90.4 % with this, at 1.18 times the time needed."""
EARLY_SHARE = 0.95
"""The same with fewer than `WINDOW`, so that one disturbed prompt of twenty does not decide."""
MEDIAN_LIMIT = 1.2
"""A promise is at most this factor above the median."""
MOST = 5.0
PRIOR = (1.0,) * 8
"""A worker's first ratios: one disturbed short prompt says nothing about a long one."""


class Accuracy:
    """Ratios of achieved to predicted times, the last `WINDOW` of them."""

    def __init__(self) -> None:
        self._ratios: deque[float] = deque(maxlen=WINDOW)
        self.factor = 1.0
        """Promise / prediction."""
        self.promised = self.kept = 0
        """Promises made, and those that came within `TOLERANCE`."""
        self.observed_at = -math.inf
        """When the last first token came, on the router's clock."""

    @property
    def error(self) -> float | None:
        """Median of |achieved / predicted - 1|; None before the first."""
        return sorted(abs(ratio - 1) for ratio in self._ratios)[len(self._ratios) // 2] if self._ratios else None

    def forget(self) -> None:
        """Drops observations that may be out of date."""
        self._ratios.clear()
        self.factor = 1.0

    def observe(
        self, predicted_s: float, achieved_s: float, promised_s: float | None = None, now: float = -math.inf
    ) -> None:
        """A prediction (before any factor), the time it really took, and the promise. `now` is when it came."""
        self.observed_at = max(self.observed_at, now)
        if predicted_s <= 0 or achieved_s <= 0:
            return
        if promised_s is not None:
            self.promised += 1
            self.kept += achieved_s <= TOLERANCE * promised_s
        self._ratios.append(achieved_s / predicted_s)
        ordered = sorted((*self._ratios, *PRIOR[: WINDOW - len(self._ratios)]))
        share = KEPT_SHARE if len(self._ratios) == WINDOW else EARLY_SHARE
        high = ordered[min(int(share * len(ordered)), len(ordered) - 1)] / TOLERANCE
        usual = ordered[len(ordered) // 2]
        self.factor = min(max(min(high, MEDIAN_LIMIT * usual), usual, 1 / MOST), MOST)
