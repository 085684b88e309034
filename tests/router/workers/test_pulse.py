"""Whether a worker that has sequences still moves."""

from __future__ import annotations

import asyncio

import pytest

from baton.messages import Pulse
from router.workers import pulse
from router.workers.pulse import STEP_S, TIMES_PREDICTED, Watch


class Seen:
    """A watch over a worker that is busy or not, and what it told, in order."""

    def __init__(self) -> None:
        self.busy = True
        self.told: list[str] = []
        self.asked = 0
        self.watch = Watch(lambda: self.busy, lambda: self.told.append(self.watch.stalled), self._ask)
        self.watch.start()

    def _ask(self) -> None:
        self.asked += 1


@pytest.fixture
async def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    monkeypatch.setattr(pulse, "SILENT_S", 0.05)
    return Seen()


async def test_silence_is_a_stall_and_a_word_ends_it(seen: Seen) -> None:
    for _ in range(5):
        await asyncio.sleep(0.02)
        seen.watch.heard(None)
    assert seen.told == []
    await asyncio.sleep(0.1)
    assert seen.told == ["nothing came from it for 0.05 s"]
    await asyncio.sleep(0.1)
    assert len(seen.told) == 1
    assert seen.asked >= 2, "again and again: another worker may have come"
    seen.watch.heard(None)
    assert seen.told[1:] == [""]
    await asyncio.sleep(0.1)
    assert len(seen.told) == 3, "it may stall again"
    seen.watch.stop()


async def test_one_without_sequences_may_be_silent(seen: Seen) -> None:
    seen.busy = False
    await asyncio.sleep(0.1)
    assert seen.told == []
    seen.busy = True
    await asyncio.sleep(0.1)
    assert len(seen.told) == 1
    seen.watch.stop()


@pytest.mark.parametrize(
    ("age_s", "predicted_s", "stalled"),
    [
        (STEP_S * 0.9, 0.01, False),
        (STEP_S * 1.1, 0.01, True),
        (STEP_S * 1.1, 0.0, True),
        (5 * 1.0, 1.0, False),  # a machine that makes it five times slower
        (TIMES_PREDICTED * 1.1, 1.0, True),
    ],
)
async def test_an_overdue_step_is_a_stall_although_heartbeats_come(
    seen: Seen, age_s: float, predicted_s: float, stalled: bool
) -> None:
    seen.watch.heard(Pulse(7, age_s, predicted_s))
    assert bool(seen.watch.stalled) is stalled
    seen.watch.heard(Pulse(8, 0.0, predicted_s))
    assert not seen.watch.stalled
    seen.watch.stop()


async def test_a_stream_that_is_down_is_not_judged(seen: Seen) -> None:
    seen.watch.stop()
    await asyncio.sleep(0.1)
    assert seen.told == []
