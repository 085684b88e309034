"""Clusters with a fault: a run must fail, and say what is wrong."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest

from baton.chaos import aftermath
from baton.chaos.config import ChaosConfig
from baton.chaos.harm import KINDS
from baton.chaos.plan import ChaosPlan, Strike, make_plan
from baton.chaos.run import chaos
from baton.chaos.verdict import Judgement

STREAMS = 12
SIMULATED = ChaosConfig(prefill=2, decode=3)


def few(config: ChaosConfig, streams: int, *at_s: float) -> ChaosPlan:
    """Nothing but kills of decode workers at these times, with so many requests and streams."""
    plan = make_plan(config, list(KINDS))
    strikes = tuple(Strike(at, "kill", "decode", 0.5, 0.0) for at in at_s)
    return replace(plan, at_once=streams, scripts=plan.scripts[:streams], strikes=strikes)


async def run(faults: str, config: ChaosConfig, plan: ChaosPlan) -> Judgement:
    lines: list[str] = []
    found = await chaos(config, lines.append, plan=plan, program=(sys.executable, "-m", "tests.chaos.mutant", faults))
    assert not found.good
    assert any("FAILED" in line for line in lines)
    return found


def told(found: Judgement, what: str) -> list[str]:
    return [difference.got for difference in found.differences if difference.what == what]


async def test_a_token_that_comes_twice_and_a_block_that_leaks_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aftermath, "QUIET_S", 1.0)
    found = await run("repeats,leaks", SIMULATED, few(SIMULATED, STREAMS, 0.7, 1.7))
    assert any("was next" in got for got in told(found, "order"))
    assert {difference.what for difference in found.differences} == {"order"}
    assert any("held blocks" in line for line in found.leftovers)


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("fault", "what"), [("repeats", "order"), ("shifts", "error"), ("forgets_seed", "token"), ("leaks", "")]
)
async def test_each_fault_is_told_alone(fault: str, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aftermath, "QUIET_S", 3.0)
    found = await run(fault, SIMULATED, few(SIMULATED, STREAMS, 0.7, 1.7))
    assert {difference.what for difference in found.differences} == ({what} if what else set())
    assert any("held blocks" in line for line in found.leftovers) is (fault == "leaks")


@pytest.mark.nightly
@pytest.mark.timeout(900)
async def test_penalties_that_a_sequence_forgets_are_told() -> None:
    config = ChaosConfig(engine="model", deterministic=True, prefill=2, decode=2)
    plan = few(config, 8, 2.0, 20.0)
    found = await run("forgets_penalties", config, plan)
    assert told(found, "token")
    assert not found.leftovers
