"""The engine's thread."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import cast

import pytest

from baton.cost import CostModel, StepShape
from baton.engine.api import Engine, Sampled, Sequence, Work
from baton.spec import AttemptKey
from baton.worker.runner import Runner, StepReport
from decode_worker.scheduler import DecodeScheduler
from tests.prefill_worker.builders import sequence


class Waits:
    """An engine whose step lasts until it is told to end."""

    def __init__(self) -> None:
        self.begun, self.end = threading.Event(), threading.Event()

    def step(self, batch: list[Work]) -> list[Sampled | None]:
        self.begun.set()
        assert self.end.wait(10.0)
        for work in batch:
            work.sequence.computed += work.count
        return [Sampled((1,)) for _ in batch]


class Learns(CostModel):
    """Remembers what it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[float] = []

    def observe(self, shape: StepShape, seconds: float) -> None:
        self.seen.append(seconds)


class Reports:
    def __init__(self) -> None:
        self.steps: asyncio.Queue[StepReport] = asyncio.Queue()

    def on_step(self, report: StepReport) -> None:
        self.steps.put_nowait(report)

    def on_removed(self, key: AttemptKey) -> None: ...


def resident() -> Sequence:
    made = sequence(5, computed=5)
    made.tokens.append(7)
    return made


@pytest.mark.parametrize("away", [False, True])
async def test_a_step_that_spans_a_pause_of_the_process_teaches_nothing(away: bool) -> None:
    """The loop stands for the process: both stop when it is suspended."""
    engine, model, reports = Waits(), Learns(), Reports()
    runner = Runner(cast(Engine, engine), DecodeScheduler(), reports, model)
    try:
        one = resident()
        runner.add(one)
        await asyncio.to_thread(engine.begun.wait, 10.0)
        if away:
            time.sleep(0.7)  # noqa: ASYNC251  holds the loop, as this test is about
        else:
            await asyncio.sleep(0.7)
        engine.end.set()
        async with asyncio.timeout(10.0):
            await reports.steps.get()
        runner.remove(one.key)
        assert any(seconds >= 0.7 for seconds in model.seen) is not away
    finally:
        await runner.stop()
