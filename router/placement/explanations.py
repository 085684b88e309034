"""Why requests went where they did: the last decisions, kept for `baton explain`."""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

from router.placement.offers import Candidate
from router.placement.policy import Decision, Plan

DECISIONS = 16
"""Of one request: its prompt's, and the last ones about its handoffs."""
CANDIDATES = 8
"""Of one decision: the best ones."""


class Explanation(NamedTuple):
    """One decision. `step` is prompt or decode; `at` in seconds on the router's clock; `others` counts the candidates
    that are not kept. The times were promised, unless the request was `refused`."""

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
    """By tenant salt and request id, which a client knows. Past `requests` the oldest one is forgotten."""

    def __init__(self, requests: int) -> None:
        self._requests = requests
        self._found: OrderedDict[tuple[str, str], list[Explanation]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._found)

    def prompt(self, salt: str, request_id: str, plan: Plan, at: float, unseen: int = 0, refused: bool = False) -> None:
        """Where a prompt goes, or would have gone had it not been refused; `unseen` workers were not considered."""
        self._found.pop((salt, request_id), None)  # an earlier request had the same label
        self._add((salt, request_id), _of_plan(plan, at, unseen, refused))

    def again(self, salt: str, request_id: str, plan: Plan, at: float, unseen: int = 0) -> None:
        """Where it goes on after a former attempt."""
        self._add((salt, request_id), _of_plan(plan, at, unseen))

    def decode(self, salt: str, request_id: str, decision: Decision, at: float, unseen: int = 0) -> None:
        """Which decode worker it was bound to."""
        told = Explanation(at, "decode", decision.chosen, decision.reason, decision.candidates, unseen)
        self._add((salt, request_id), told)

    def find(self, salt: str, request_id: str) -> list[Explanation]:
        """In order; empty for a request that is unknown or forgotten."""
        return [told._replace(candidates=_ordered(told)) for told in self._found.get((salt, request_id), ())]

    def _add(self, label: tuple[str, str], told: Explanation) -> None:
        if (cut := len(told.candidates) - CANDIDATES) > 0:
            told = told._replace(candidates=_ordered(told)[:CANDIDATES], others=told.others + cut)
        kept = self._found.setdefault(label, [])
        kept.append(told)
        if len(kept) > DECISIONS:
            del kept[1]
        while len(self._found) > self._requests:
            self._found.popitem(last=False)


def _of_plan(plan: Plan, at: float, unseen: int, refused: bool = False) -> Explanation:
    return Explanation(
        at, "prompt", plan.chosen, plan.reason, plan.candidates, unseen,
        plan.meets, plan.constraint, plan.ttft_s, plan.tpot_s, plan.way.value, refused,
    )  # fmt: skip


def _ordered(told: Explanation) -> tuple[Candidate, ...]:
    """The chosen one first, then the feasible ones, soonest first."""

    def rank(candidate: Candidate) -> tuple[bool, bool, float]:
        cost = candidate.load if candidate.ttft_s is None else candidate.ttft_s
        return candidate.name != told.chosen, not candidate.feasible, cost

    return tuple(sorted(told.candidates, key=rank))
