"""Why requests went where they did: the last decisions, kept to be asked for (`baton explain`)."""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

from router.placement.offers import Candidate
from router.placement.policy import Decision, Plan

REQUESTS = 4096
"""The oldest is forgotten for the next."""
DECISIONS = 16
"""Of one request: its prompt's, and the last ones about its handoffs."""
CANDIDATES = 8
"""The best ones; a decision among a thousand workers is not kept whole."""


class Explanation(NamedTuple):
    """One decision. `step` is prompt or decode; `at` on the router's clock, in seconds; `others` were not kept. The
    times were promised, unless the request was `refused`."""

    at: float
    step: str
    chosen: str
    reason: str
    candidates: tuple[Candidate, ...]
    others: int
    meets: bool = True
    constraint: str = ""
    ttft_s: float | None = None
    tpot_s: float | None = None
    way: str = ""
    refused: bool = False


class Explanations:
    """By tenant salt and request id, which is what a client knows."""

    def __init__(self) -> None:
        self._found: OrderedDict[tuple[str, str], list[Explanation]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._found)

    def prompt(self, salt: str, request_id: str, plan: Plan, at: float, unseen: int = 0, refused: bool = False) -> None:
        """Where a prompt goes, or would have gone had it not been refused; `unseen` workers were not looked at."""
        kept, others = _best(plan.candidates, plan.chosen)
        self._add(
            (salt, request_id),
            Explanation(
                at,
                "prompt",
                plan.chosen,
                plan.reason,
                kept,
                others + unseen,
                plan.meets,
                plan.constraint,
                plan.ttft_s,
                plan.tpot_s,
                plan.way.value,
                refused,
            ),
        )

    def decode(self, salt: str, request_id: str, decision: Decision, at: float, unseen: int = 0) -> None:
        """Which decode worker it was bound to."""
        kept, others = _best(decision.candidates, decision.chosen)
        self._add(
            (salt, request_id), Explanation(at, "decode", decision.chosen, decision.reason, kept, others + unseen)
        )

    def find(self, salt: str, request_id: str) -> list[Explanation]:
        """In order; empty for a request that is unknown or forgotten."""
        return [
            found._replace(candidates=_ordered(found.candidates, found.chosen))
            for found in self._found.get((salt, request_id), ())
        ]

    def _add(self, key: tuple[str, str], explanation: Explanation) -> None:
        if explanation.step == "prompt":
            self._found.pop(key, None)  # the label is used anew
        found = self._found.setdefault(key, [])
        found.append(explanation)
        if len(found) > DECISIONS:
            del found[1]
        while len(self._found) > REQUESTS:
            self._found.popitem(last=False)


def _best(candidates: tuple[Candidate, ...], chosen: str) -> tuple[tuple[Candidate, ...], int]:
    """Those to keep, in any order, and how many others there were."""
    if len(candidates) <= CANDIDATES:
        return candidates, 0
    return _ordered(candidates, chosen)[:CANDIDATES], len(candidates) - CANDIDATES


def _ordered(candidates: tuple[Candidate, ...], chosen: str) -> tuple[Candidate, ...]:
    """The chosen one first, then those that would do, soonest first."""
    return tuple(
        sorted(
            candidates,
            key=lambda found: (
                found.name != chosen,
                not found.feasible,
                found.load if found.ttft_s is None else found.ttft_s,
            ),
        )
    )
