"""What is kept of decisions, and for how long."""

from __future__ import annotations

from router.placement.explanations import CANDIDATES, DECISIONS, Explanations
from router.placement.offers import Candidate, Way
from router.placement.policy import Decision, Plan

REQUESTS = 64


def plan(chosen: str, *names: str) -> Plan:
    candidates = tuple(Candidate(name, 0, True, ttft_s=index * 0.1) for index, name in enumerate(names))
    return Plan(chosen, Way.PREFILL, True, "because", candidates, 0.2, 0.01)


def test_the_chosen_one_comes_first_and_the_rest_is_cut() -> None:
    explanations = Explanations(REQUESTS)
    names = [f"p{index}" for index in range(20)]
    explanations.prompt("", "r", plan("p7", *names), 1.0)
    (found,) = explanations.find("", "r")
    assert [candidate.name for candidate in found.candidates] == ["p7", *names[: CANDIDATES - 1]]
    assert (found.others, found.chosen, found.ttft_s) == (20 - CANDIDATES, "p7", 0.2)


def test_handoffs_follow_their_prompt_and_tenants_are_apart() -> None:
    explanations = Explanations(REQUESTS)
    explanations.prompt("a", "r", plan("p0", "p0"), 1.0)
    for index in range(DECISIONS + 3):
        explanations.decode("a", "r", Decision(f"d{index}", "least loaded", (Candidate("d0", 0.5, True),)), 2.0)
    assert [entry.step for entry in explanations.find("a", "r")] == ["prompt", *["decode"] * (DECISIONS - 1)]
    assert explanations.find("a", "r")[-1].chosen == f"d{DECISIONS + 2}", "where it really went"
    assert explanations.find("b", "r") == []
    explanations.prompt("a", "r", plan("p1", "p1"), 3.0)
    assert [entry.chosen for entry in explanations.find("a", "r")] == ["p1"]


def test_the_oldest_is_forgotten() -> None:
    explanations = Explanations(REQUESTS)
    for index in range(REQUESTS + 5):
        explanations.prompt("", str(index), plan("p0", "p0"), 1.0)
    assert len(explanations) == REQUESTS
    assert explanations.find("", "4") == []
    assert explanations.find("", "5") != []


def test_none_are_kept_where_none_are_wanted() -> None:
    explanations = Explanations(0)
    explanations.prompt("", "r", plan("p0", "p0"), 1.0)
    explanations.decode("", "r", Decision("d0", "least loaded", ()), 2.0)
    assert explanations.find("", "r") == []
    assert len(explanations) == 0
