"""What an attempt knows of itself, and what its handoffs cost."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import cast

import pytest

from baton.rpc.awake import Timer
from baton.spec import HandoffKey
from baton.worker.sending.outbound import Closer, Outbound
from kvtransfer.handoffs.delivery import Delivery
from kvtransfer.handoffs.messages import BlockMove, Ticket
from prefill_worker.prompt import Prompt, PromptState
from tests.prefill_worker.builders import waiting


class Closes:
    """A `Closer` that remembers."""

    def __init__(self) -> None:
        self.said: list[tuple[int, str]] = []

    def send_close(self, key: HandoffKey, reason: str) -> None:
        self.said.append((key.handoff, reason))


def bound(owner: Prompt) -> tuple[Outbound, Delivery]:
    key = HandoffKey(owner.key, 1)
    delivery = Delivery(key, [4, 5], 20, 16)
    owner.outbound = Outbound(owner.spec, delivery, 0.0)
    return owner.outbound, delivery


def ticket(key: HandoffKey, cached: int = 0) -> Ticket:
    return Ticket(key, 1, b"t" * 16, (7, 8), cached, "w")


def test_a_new_prompt_waits_and_holds_nothing() -> None:
    new = waiting(20)
    assert (new.state, new.uncomputed, new.in_engine, new.writing, new.over) == (
        PromptState.WAITING,
        20,
        False,
        False,
        False,
    )
    assert new.queue_ms >= 0


def test_uncomputed_counts_what_is_cached_and_computed() -> None:
    running = waiting(20)
    running.cached_tokens = 16
    assert running.uncomputed == 4
    running.computed = 18
    assert running.uncomputed == 2


def test_busy_while_a_step_or_a_write_may_touch_its_blocks() -> None:
    running = waiting(20)
    _, delivery = bound(running)
    delivery.granted(ticket(delivery.key))
    delivery.computed(20)
    moves = delivery.take_moves(9)
    assert running.writing
    delivery.fail("cancelled")
    assert running.writing  # the write still reads them
    delivery.written(delivery.key, moves)
    assert delivery.in_flight == 0
    states = [PromptState.COMPUTING, PromptState.STOPPING]
    assert [state for state in PromptState if replace(running, state=state).in_engine] == states


def test_a_report_without_a_handoff_has_no_transfer() -> None:
    done = waiting(20)
    done.received_at, done.started_at, done.first_token_at, done.cached_tokens = 1.0, 1.5, 2.25, 16
    report = done.report()
    assert (report.queue_ms, report.prefill_ms, report.cached_tokens) == (500.0, 750.0, 16)
    assert report.transfer is None
    bound(done)
    assert done.report().transfer is None  # bound, but never granted


@pytest.mark.parametrize(("last_written_at", "exposed"), [(2.0, 0.0), (3.0, 750.0), (None, 0.0)])
def test_a_report_of_a_handoff(last_written_at: float | None, exposed: float) -> None:
    done = waiting(20)
    done.started_at, done.first_token_at = 1.5, 2.25
    outbound, delivery = bound(done)
    delivery.granted(ticket(delivery.key))
    outbound.transport = "shm"
    outbound.cost.cached_blocks = 1
    outbound.wrote(100, 2, 0.25)
    outbound.wrote(50, 1, 0.25)
    outbound.cost.last_written_at = last_written_at
    moved = done.report().transfer
    assert moved is not None
    assert (moved.transport, moved.ms, moved.exposed_ms) == ("shm", 500.0, exposed)
    assert (moved.bytes, moved.blocks, moved.cached_blocks) == (150, 3, 1)


def test_each_handoff_has_its_own_costs_and_its_own_close() -> None:
    owner = waiting(20)
    outbound, delivery = bound(owner)
    first, second = Closes(), Closes()
    outbound.bound_to(delivery.key, cast(Closer, first))
    outbound.wrote(100, 1, 1.0)
    delivery.granted(ticket(delivery.key))
    delivery.computed(20)
    moves = delivery.take_moves(1)
    assert moves == [BlockMove(4, 7, 0)]
    key = HandoffKey(owner.key, 2)
    former = delivery.key
    assert delivery.rebind(key)
    outbound.bound_to(key, cast(Closer, second))
    assert (outbound.key, outbound.cost.bytes) == (key, 0)
    outbound.close_ended()
    assert first.said == second.said == []  # a write of the first is under way
    delivery.write_failed(former, moves, "torn")
    outbound.close_ended()
    outbound.close_ended()
    assert [handoff for handoff, _ in first.said] == [1]
    assert second.said == []


async def test_one_timer_at_a_time() -> None:
    outbound, _ = bound(waiting(20))
    fired: list[int] = []
    outbound.set_timer(Timer(0.001, lambda: fired.append(1)))
    outbound.set_timer(Timer(0.002, lambda: fired.append(2)))
    await asyncio.sleep(0.02)
    outbound.set_timer(Timer(0.001, lambda: fired.append(3)))
    outbound.set_timer(None)
    await asyncio.sleep(0.02)
    assert fired == [2]


def test_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    outbound, _ = bound(waiting(20))
    assert [outbound.time_left_s] == [None]
    monkeypatch.setattr("baton.worker.sending.outbound.time.monotonic", lambda: 100.0)
    outbound.deadline_at = 102.5
    assert outbound.time_left_s == 2.5
    outbound.deadline_at = 99.0
    assert outbound.time_left_s == 0.001
