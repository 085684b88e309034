"""How long an output will likely become, learned from those that ended."""

from __future__ import annotations

from collections import deque

WINDOW = 256
ENOUGH = 32
"""Outputs that must have ended before the prior is given up."""
PRIOR_TOKENS = 256
QUANTILE = 0.9


class OutputLengths:
    """The last `WINDOW` outputs of a model.

    One that was cut off, by its limit or by its client, tells only that it would have become longer: the quantile is
    that of the product-limit estimate (Kaplan and Meier, JASA 53:457, 1958).
    """

    def __init__(self) -> None:
        self._seen: deque[tuple[int, bool]] = deque(maxlen=WINDOW)
        self._quantile: int | None = None

    def observe(self, tokens: int, *, complete: bool) -> None:
        """An output of so many tokens is over; `complete` where it ended by itself."""
        self._seen.append((tokens, not complete))  # of equal lengths the complete ones come first
        self._quantile = None

    def likely(self, max_tokens: int) -> int:
        """Tokens that an output with this limit will likely not exceed; at most the limit."""
        if len(self._seen) < ENOUGH:
            return min(PRIOR_TOKENS, max_tokens)
        if self._quantile is None:
            self._quantile = self._estimate()
        return min(self._quantile, max_tokens)

    def _estimate(self) -> int:
        longer, at_risk = 1.0, len(self._seen)
        for tokens, cut_off in sorted(self._seen):
            if not cut_off:
                longer *= 1 - 1 / at_risk
                if longer <= 1 - QUANTILE + 1e-9:
                    return tokens
            at_risk -= 1
        return max(PRIOR_TOKENS, *(tokens for tokens, _ in self._seen))  # the end of the longest ones was not seen
