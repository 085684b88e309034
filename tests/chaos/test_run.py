"""`baton chaos` against real clusters: a short run, long ones at night, and how it ends otherwise."""

from __future__ import annotations

import asyncio
import signal
import sys
from asyncio.subprocess import PIPE

import psutil
import pytest

from baton.chaos.config import ChaosConfig
from baton.chaos.run import chaos
from tests.cli.runner import baton, environment
from tests.launch.processes import wait_gone

START_S = 30.0


async def well(config: ChaosConfig) -> None:
    lines: list[str] = []
    found = await chaos(config, lines.append)
    print("\n".join(lines))
    assert found.good, "\n".join(lines)
    assert found.failovers


async def test_a_short_run_finds_nothing() -> None:
    await well(ChaosConfig(seed=1, minutes=0.3))


@pytest.mark.nightly
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", range(10, 20))
async def test_a_long_run_finds_nothing(seed: int) -> None:
    await well(ChaosConfig(seed=seed, minutes=3.0))


@pytest.mark.nightly
@pytest.mark.timeout(1200)
async def test_a_long_run_with_the_model_finds_nothing() -> None:
    await well(ChaosConfig(seed=1, minutes=3.0, engine="model", deterministic=True))


async def test_a_plan_that_can_not_be_is_refused() -> None:
    refused = await baton("chaos", "--engine", "model")
    assert refused.status == 2
    assert refused.error_line.startswith("deterministic: ")


async def test_ctrl_c_leaves_no_process() -> None:
    command = (sys.executable, "-m", "baton.cli", "chaos", "--prefill", "2", "--decode", "2")
    process = await asyncio.create_subprocess_exec(*command, stdout=PIPE, stderr=PIPE, env=environment())
    assert process.stdout is not None
    async with asyncio.timeout(START_S):
        assert b"seed 0" in await process.stdout.readline()
        children = [child.pid for child in psutil.Process(process.pid).children()]
        process.send_signal(signal.SIGINT)
        _, error = await process.communicate()
    assert (process.returncode, error) == (130, b"")
    assert len(children) == 5
    assert wait_gone(children) == []
