"""The order of writes, and the end of a write that goes wrong."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

import pytest

from baton import errors
from baton.spec import HandoffKey
from baton.worker.sending import mover as module
from baton.worker.sending.mover import Mover
from baton.worker.sending.outbound import Outbound
from kvtransfer.handoffs.delivery import Delivery, DeliveryState
from kvtransfer.handoffs.messages import BlockMove, Ticket
from kvtransfer.transports.base import WriteReceipt
from tests.prefill_worker.builders import spec
from tests.rpc.waiting import until


class ScriptedChannel:
    """Writes nowhere, and says when."""

    def __init__(self) -> None:
        self.batches: list[tuple[bytes, list[int]]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.errors: list[Exception] = []
        self.closed = False

    def write(self, ticket: Ticket, moves: Sequence[BlockMove], deadline: float) -> WriteReceipt:
        self.batches.append((ticket.key.attempt, [move.index for move in moves]))
        assert self.gate.wait(20)
        if self.errors:
            raise self.errors.pop(0)
        return WriteReceipt(100 * len(moves), 0.5)

    def close(self) -> None:
        self.closed = True


class Bench:
    """A mover, its channel, and what it reported. Implements `MoverEvents`."""

    def __init__(self, executor: ThreadPoolExecutor, may_write: Callable[[], bool] = lambda: True) -> None:
        self.channel = ScriptedChannel()
        self.mover = Mover(self, executor, lambda: may_write(), 10.0)
        self.handed_out_: list[Outbound] = []
        self.wrote_: list[Outbound] = []
        self.failed: list[str] = []
        self.task: asyncio.Task[None] | None = None

    def handed_out(self, outbound: Outbound) -> None:
        self.handed_out_.append(outbound)

    def wrote(self, outbound: Outbound) -> None:
        self.wrote_.append(outbound)

    def write_failed(self, outbound: Outbound, key: HandoffKey, error: errors.BatonError) -> None:
        self.failed.append(f"{type(error).__name__}: {error}")

    def outbound(self, blocks: int, ready: int | None = None) -> Outbound:
        """A granted handoff."""
        made = spec(16 * blocks)
        delivery = Delivery(HandoffKey(made.attempt, 1), range(blocks), 16 * blocks, 16)
        delivery.granted(Ticket(delivery.key, 1, b"t" * 16, tuple(range(100, 100 + blocks)), 0, "w"))
        delivery.computed(16 * (blocks if ready is None else ready))
        outbound = Outbound(made, delivery, 0.0)
        self.mover.add(outbound)
        return outbound

    def run(self) -> asyncio.Task[None]:
        self.task = asyncio.create_task(self.mover.run(self.channel))
        return self.task


@asynccontextmanager
async def running(may_write: Callable[[], bool] = lambda: True) -> AsyncIterator[Bench]:
    executor = ThreadPoolExecutor(1)
    bench = Bench(executor, may_write)
    try:
        yield bench
    finally:
        bench.channel.gate.set()
        if bench.task is not None:
            bench.task.cancel()
            await asyncio.gather(bench.task, return_exceptions=True)
        executor.shutdown()


async def test_takes_turns_in_bounded_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOVE_BLOCKS", 2)
    async with running() as bench:
        first, second = bench.outbound(5), bench.outbound(3)
        bench.run()
        await until(lambda: len(bench.wrote_) == 5)
        one, two = first.key.attempt, second.key.attempt
        assert bench.channel.batches == [(one, [0, 1]), (two, [0, 1]), (one, [2, 3]), (two, [2]), (one, [4])]
        assert first.delivery.delivered
        assert (first.cost.blocks, first.cost.bytes, first.cost.seconds) == (5, 500, 1.5)
        assert not bench.mover.under_way[first.key]


async def test_waits_for_more_and_is_woken() -> None:
    async with running() as bench:
        outbound = bench.outbound(4, ready=1)
        bench.run()
        await until(lambda: len(bench.wrote_) == 1)
        outbound.delivery.computed(64)
        bench.mover.wake()
        await until(lambda: outbound.delivery.delivered)
        assert [indices for _, indices in bench.channel.batches] == [[0], [1, 2, 3]]


async def test_removed_gets_no_turn() -> None:
    async with running() as bench:
        first, second = bench.outbound(2), bench.outbound(2)
        bench.mover.remove(first)
        bench.mover.remove(first)
        bench.run()
        await until(lambda: bench.wrote_ == [second])
        assert len(bench.channel.batches) == 1


@pytest.mark.parametrize("error", [errors.WriteRefused("no"), errors.ChecksumMismatch("other bytes")])
async def test_the_channel_survives_a_refused_write(error: Exception) -> None:
    async with running() as bench:
        bench.channel.errors = [error]
        first, second = bench.outbound(2), bench.outbound(2)
        task = bench.run()
        await until(lambda: bench.wrote_ == [second])
        assert not task.done()
        assert first.delivery.state is DeliveryState.FAILED
        assert first.delivery.in_flight == 0
        assert bench.failed == [f"{type(error).__name__}: {error}"]


@pytest.mark.parametrize("error", [errors.PeerClosed("gone"), errors.DeadlineExceeded("late"), OSError("odd")])
async def test_anything_else_ends_the_channel_and_the_batch(error: Exception) -> None:
    async with running() as bench:
        bench.channel.errors = [error]
        outbound = bench.outbound(2)
        with pytest.raises(type(error)):
            await bench.run()
        assert outbound.delivery.in_flight == 0
        assert not bench.mover.under_way[outbound.key]
        assert len(bench.failed) == 1


async def test_nothing_is_written_without_a_lease() -> None:
    async with running(lambda: False) as bench:
        outbound = bench.outbound(2)
        with pytest.raises(errors.DeadlineExceeded, match="lease"):
            await bench.run()
        assert bench.channel.batches == []
        assert outbound.delivery.in_flight == 0


@pytest.mark.parametrize("fails", [False, True])
async def test_a_write_outlives_its_stream(fails: bool) -> None:
    """Cancelled, the channel closes; only the thread's return settles the batch."""
    async with running() as bench:
        bench.channel.gate.clear()
        outbound = bench.outbound(2)
        task = bench.run()
        await until(lambda: bench.channel.batches)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert bench.channel.closed
        assert outbound.delivery.in_flight == 2
        assert bench.mover.under_way[outbound.key]
        bench.channel.errors = [errors.PeerClosed("closed")] if fails else []
        bench.channel.gate.set()
        await until(lambda: not bench.mover.under_way[outbound.key])
        assert outbound.delivery.in_flight == 0
        assert len(bench.failed) == fails
        assert len(bench.wrote_) == (not fails)
