"""Binding one attempt to a decode worker, and binding it again when that comes to nothing.

The first token never waits for any of this. A refusal for want of room is tried elsewhere, or again after a while; a
worker that can't take the sequence at all is not asked twice. When the attempt moves on from a worker that may hold
something of it, that worker gets a cancel, and with it a tombstone: so it is not asked again either.
"""

from __future__ import annotations

from enum import Enum

from baton.errors import BatonError, ResourceExhausted, Unavailable

BACKOFF_S, BACKOFF_LIMIT_S = 0.02, 0.5
RETRY_AFTER_LIMIT_S = 5.0


class Refusal(Enum):
    """Why a handoff came to nothing. The values are the wire's."""

    UNSPECIFIED = 0
    NO_CAPACITY = 1
    CANCELLED = 2
    UNKNOWN_ROUTER = 3
    MISMATCH = 4
    UNREACHABLE = 5
    DRAINING = 6
    TOO_LARGE = 7
    EXPIRED = 8


FINAL = frozenset({Refusal.CANCELLED, Refusal.MISMATCH, Refusal.DRAINING, Refusal.TOO_LARGE})
"""This worker will not take this attempt, however often it is asked."""
UNCERTAIN = frozenset({Refusal.UNSPECIFIED, Refusal.UNREACHABLE, Refusal.EXPIRED})
"""The worker may hold something of the attempt."""


class Handoffs:
    """The handoffs of one attempt: how many there were, whom not to ask, and how long to wait before the next.

    Workers go by incarnation: one that has started again under its name has neither refused nor holds anything.
    """

    def __init__(self) -> None:
        self.number = 0
        self.excluded: set[str] = set()
        self.uncertain = ""
        """A worker that may hold something of an earlier handoff."""
        self._failures = 0
        self._last: tuple[Refusal, str] | None = None
        self._retry_after_s: float | None = None

    def bound(self, worker: str) -> str | None:
        """The next handoff goes to `worker`. Returns a worker to cancel the attempt at, if it moves away from one."""
        self.number += 1
        left, self.uncertain = self.uncertain, ""
        if not left or left == worker:
            return None
        self.excluded.add(left)
        return left

    def failed(self, worker: str, reason: Refusal, message: str, retry_after_s: float | None) -> float:
        """The current handoff came to nothing. Returns how long to wait before asking the same worker again."""
        self._failures += 1
        self._last, self._retry_after_s = (reason, message), retry_after_s
        if reason in FINAL:
            self.excluded.add(worker)
        if reason in UNCERTAIN:
            self.uncertain = worker
        backoff = min(BACKOFF_S * 2 ** min(self._failures - 1, 10), BACKOFF_LIMIT_S)
        return backoff if retry_after_s is None else min(max(retry_after_s, BACKOFF_S), RETRY_AFTER_LIMIT_S)

    def error(self, waited_s: float | None = None) -> BatonError:
        """Why the handoffs are given up: after a wait, or because nobody is left to ask."""
        if self._last is None:
            return Unavailable("no decode worker is left", 1.0, "decode_workers")
        reason, message = self._last
        said = f"{reason.name}: {message}" if message else reason.name
        lead = "no decode worker took the sequence" + ("" if waited_s is None else f" within {waited_s:g} s")
        if reason in (Refusal.NO_CAPACITY, Refusal.TOO_LARGE):
            retry = None if reason is Refusal.TOO_LARGE else self._retry_after_s or 1.0
            return ResourceExhausted(f"{lead}; the last said {said}", retry, "decode_blocks")
        return Unavailable(f"{lead}; the last said {said}", self._retry_after_s or 1.0, "decode_workers")
