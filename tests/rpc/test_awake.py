"""The clock by which peers are judged: real time, but for what this process has slept through."""

from __future__ import annotations

import asyncio
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.rpc import awake
from baton.rpc.awake import CATCH_UP_S, LATE_S, TICK_S, AwakeClock, Timer, patience


class Hands:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.at = 100.0

    def __call__(self) -> float:
        return self.at


def looked_every(step: float, seconds: float, clock: AwakeClock, hands: Hands) -> float:
    """What passes by the clock."""
    before = clock.now()
    for _ in range(round(seconds / step)):
        hands.at += step
        clock.now()
    return clock.now() - before


@pytest.mark.parametrize("step", [0.001, TICK_S, LATE_S * 0.99])
def test_it_goes_like_any_other_while_the_process_runs(step: float) -> None:
    hands = Hands()
    assert looked_every(step, 20.0, AwakeClock(hands), hands) == pytest.approx(20.0, abs=step)


@pytest.mark.parametrize("pause", [0.6, 4.5, 30.0, 86_400.0])
def test_a_pause_counts_as_a_tick_and_is_caught_up_with(pause: float) -> None:
    hands = Hands()
    clock = AwakeClock(hands)
    before = clock.now()
    hands.at += pause
    assert clock.now() - before == pytest.approx(TICK_S)
    still = min(pause, CATCH_UP_S)
    assert clock.still_s == pytest.approx(still)
    assert looked_every(TICK_S, still, clock, hands) == pytest.approx(0.0, abs=1e-6)
    assert looked_every(TICK_S, 5.0, clock, hands) == pytest.approx(5.0)
    assert clock.missed == pytest.approx(pause - TICK_S + still)


def test_another_thread_sees_a_pause_before_the_loop_does() -> None:
    hands = Hands()
    clock = AwakeClock(hands)
    hands.at += 3.0
    assert clock.missed == pytest.approx(3.0)


@given(st.lists(st.floats(0.0, 40.0), max_size=50))
def test_it_never_goes_back_nor_ahead_of_real_time(steps: list[float]) -> None:
    hands = Hands()
    clock = AwakeClock(hands)
    last = clock.now()
    for step in steps:
        hands.at += step
        now = clock.now()
        assert -1e-9 <= now - last <= step + 1e-9
        last = now


async def test_a_loop_that_is_held_judges_nobody_by_that_time() -> None:
    """The verdict is due while the loop is held. Afterwards the timer waits for what came meanwhile."""
    loop = asyncio.get_running_loop()
    came: list[float] = []
    timer = Timer(0.3, lambda: came.append(loop.time()))
    await asyncio.sleep(0.01)
    time.sleep(0.8)  # noqa: ASYNC251  holds the loop, as this test is about
    held_until = loop.time()
    await asyncio.sleep(0.05)
    assert not came
    timer.restart()
    async with asyncio.timeout(5.0):
        while not came:
            await asyncio.sleep(0.01)
    assert came[0] - held_until > 0.7, "the clock stood still as long as the loop was held"


async def test_patience_ends_with_silence() -> None:
    heard: list[int] = []

    async def listen() -> None:
        async with patience(0.05) as timer:
            for word in range(10):
                await asyncio.sleep(0.02)
                timer.restart()
                heard.append(word)
            await asyncio.Event().wait()

    with pytest.raises(TimeoutError):
        await listen()
    assert len(heard) == 10


async def test_patience_leaves_other_ends_alone() -> None:
    async with patience(0.01):
        pass
    await asyncio.sleep(0.02)
    with pytest.raises(ValueError, match="mine"):
        async with patience(1.0):
            raise ValueError("mine")


async def test_one_clock_a_loop() -> None:
    assert awake.clock() is awake.clock()
