"""Streams, events and ends for the tests of the verdict."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from baton.chaos.aftermath import Aftermath
from baton.chaos.harm import KINDS, Happening
from baton.chaos.load import Course, Heard
from baton.chaos.plan import LEAST_EVENTS, Script
from baton.chaos.verdict import Judgement, judge
from baton.client import Finished, FinishReason, Path, Timeline, TokenLogprobs, Tokens, Usage

FIRST = 3
SCRIPT = Script("r0", {"token_ids": [1, 2, 3], "max_tokens": 4})


def timeline(**changes: Any) -> Timeline:
    fields: dict[str, Any] = {
        "ttft_ms": 1.0, "tpot_ms": 1.0, "total_ms": 9.0, "router_ms": 0.1, "queue_ms": 0.1, "prefill_ms": 1.0,
        "transfer_ms": 1.0, "transfer_exposed_ms": 0.1, "first_step_wait_ms": 0.1, "decode_ms": 5.0, "attempts": 1,
        "handoffs": 1, "prefill_worker": "prefill-0", "decode_worker": "decode-0", "path": Path.DISAGGREGATED,
        "transport": "shm", "transfer_bytes": 1, "transfer_blocks": 1, "transfer_cached_blocks": 0,
    }  # fmt: skip
    return Timeline(**fields | changes)


def heard(
    ids: Sequence[int] = (7, 8, 9, 7),
    text: str = "abca",
    *,
    reason: FinishReason | None = FinishReason.LENGTH,
    stop: str = "",
    cached: int = 0,
    **changes: Any,
) -> Heard:
    """A whole stream, or without a `reason` its beginning."""
    found = Heard(FIRST)
    for index, token in enumerate(ids):
        scores = (TokenLogprobs(-float(token)),)
        found.take(Tokens(FIRST + index, (token,), text[index : index + 1], scores))
    if reason is not None:
        found.take(Finished(reason, Usage(FIRST, len(ids), cached), timeline(**changes), None, stop))
    return found


def course(found: Heard | None = None, **changes: Any) -> Course:
    """The first stream under harm, from second 10 to 14 with its first token at 11."""
    fields: dict[str, Any] = {"started_s": 10.0, "first_token_s": 11.0, "ended_s": 14.0}
    return Course(1, SCRIPT, heard() if found is None else found, **fields | changes)


def killed(worker: str, at_s: float) -> Happening:
    return Happening(at_s, at_s, "kill", worker)


def enough() -> list[Happening]:
    """As many events of each kind as there must be, which hit nobody."""
    return [Happening(0.0, 0.0, kind, "nobody") for kind in KINDS for _ in range(LEAST_EVENTS)]


def judged(courses: Sequence[Course], *events: Happening, left: Sequence[str] = (), **failovers: int) -> Judgement:
    """Of streams whose undisturbed one is `heard()`."""
    moved = {label.replace("_", "#"): count for label, count in failovers.items()}
    return judge([heard()], courses, [*enough(), *events], list(KINDS), Aftermath((), tuple(left)), moved)
