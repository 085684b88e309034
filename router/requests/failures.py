"""Handoffs that failed: whether the worker may be asked again, when, and the error that is left in the end."""

from __future__ import annotations

import structlog

from baton.errors import BatonError, ResourceExhausted, Unavailable
from baton.messages import HandoffFailed
from baton.spec import RefusalReason
from baton.telemetry import Counts

BACKOFF_S, BACKOFF_LIMIT_S = 0.02, 0.5
RETRY_AFTER_LIMIT_S = 5.0
FINAL = {RefusalReason.CANCELLED, RefusalReason.MISMATCH, RefusalReason.DRAINING, RefusalReason.TOO_LARGE}
"""The worker will never take this attempt."""
UNCERTAIN = {RefusalReason.UNSPECIFIED, RefusalReason.UNREACHABLE, RefusalReason.EXPIRED}
"""The worker may hold blocks of the attempt."""
log = structlog.get_logger(__name__)


class CopyLost(Unavailable):
    """The only copy of the sequence went with its worker. Another attempt can go on from the tokens that came."""


def note(failure: HandoffFailed, request_id: str, worker: str, counts: Counts) -> None:
    """Counts and logs it."""
    reason = failure.reason.name
    counts.add(f"handoffs_failed_{reason.lower()}")
    about = {"handoff": str(failure.key), "worker": worker, "reason": reason, "message": failure.message}
    log.info("handoff failed", request_id=request_id, **about)


def pause_s(failures: int, retry_after_s: float | None) -> float:
    """Seconds until the next handoff, after so many that failed; the worker may have named a time."""
    if retry_after_s is not None:
        return min(max(retry_after_s, BACKOFF_S), RETRY_AFTER_LIMIT_S)
    return min(BACKOFF_S * 2.0 ** min(failures - 1, 10), BACKOFF_LIMIT_S)


def refusal(last: HandoffFailed | None) -> BatonError:
    """The error that ends an attempt when no decode worker is left to ask."""
    if last is None:
        return Unavailable("no decode worker is left", 1.0, "decode_workers")
    said = f"{last.reason.name}: {last.message}" if last.message else last.reason.name
    text = f"no decode worker took the sequence; the last said {said}"
    if last.reason in (RefusalReason.NO_CAPACITY, RefusalReason.TOO_LARGE):
        retry = None if last.reason is RefusalReason.TOO_LARGE else last.retry_after_s or 1.0
        return ResourceExhausted(text, retry, "decode_blocks")
    return Unavailable(text, last.retry_after_s or 1.0, "decode_workers")
