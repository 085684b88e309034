"""Writes blocks to one decode worker; the only user of the pair's channel."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import Protocol

from baton import errors
from baton.spec import HandoffKey
from baton.worker.sending.outbound import Outbound
from kvtransfer.handoffs.messages import BlockMove, Ticket
from kvtransfer.transports.base import Channel, WriteReceipt

MOVE_BLOCKS = 64
"""Blocks in one write: enough to be efficient, few enough that no handoff waits long for the channel."""


class MoverEvents(Protocol):
    """Called on the event loop. With `wrote` and `write_failed` the batch is no longer under way."""

    def handed_out(self, outbound: Outbound) -> None:
        """A batch is about to be written; after the last one a commit may go, ahead of the data."""

    def wrote(self, outbound: Outbound) -> None: ...

    def write_failed(self, outbound: Outbound, key: HandoffKey, error: errors.BatonError) -> None: ...


class Mover:
    """Takes ready blocks from its attempts in turn, and writes one batch at a time on a thread of `executor`."""

    def __init__(
        self, events: MoverEvents, executor: Executor, may_write: Callable[[], bool], deadline_s: float
    ) -> None:
        """`may_write`: whether the lease on granted memory is valid; asked on the writing thread, just before."""
        self._events, self._executor, self._may_write, self._deadline_s = events, executor, may_write, deadline_s
        self._turns: deque[Outbound] = deque()
        self.under_way: Counter[HandoffKey] = Counter()
        """Batches in writes that have not returned, also on a channel that was given up."""
        self._movable = asyncio.Event()

    def add(self, outbound: Outbound) -> None:
        self._turns.append(outbound)

    def remove(self, outbound: Outbound) -> None:
        if outbound in self._turns:
            self._turns.remove(outbound)

    def wake(self) -> None:
        """To be called when an attempt may have more to write."""
        self._movable.set()

    async def run(self, channel: Channel) -> None:
        """Raises when the channel breaks."""
        while True:
            batch = self._next_batch()
            if batch is not None:
                await self._write(channel, *batch)
                continue
            self._movable.clear()
            await self._movable.wait()

    def _next_batch(self) -> tuple[Outbound, Ticket, list[BlockMove]] | None:
        for _ in range(len(self._turns)):
            outbound = self._turns.popleft()
            self._turns.append(outbound)
            ticket = outbound.delivery.ticket
            if ticket is not None and (moves := outbound.delivery.take_moves(MOVE_BLOCKS)):
                return outbound, ticket, moves
        return None

    async def _write(self, channel: Channel, outbound: Outbound, ticket: Ticket, moves: Sequence[BlockMove]) -> None:
        loop = asyncio.get_running_loop()
        self.under_way[ticket.key] += 1
        writing = loop.run_in_executor(self._executor, self._write_blocking, channel, ticket, moves)
        self._events.handed_out(outbound)
        try:
            receipt = await asyncio.shield(writing)
        except asyncio.CancelledError:
            # The thread may still be copying: only its end settles the batch.
            channel.close()
            writing.add_done_callback(lambda done: self._settle(outbound, ticket.key, moves, done))
            raise
        except (errors.WriteRefused, errors.ChecksumMismatch) as error:
            self._failed(outbound, ticket.key, moves, error)
        except Exception as error:  # a boundary: this batch is over, and the channel with it
            unknown = errors.PeerClosed(f"{type(error).__name__}: {error}")
            self._failed(outbound, ticket.key, moves, error if isinstance(error, errors.BatonError) else unknown)
            raise
        else:
            self._placed(outbound, ticket.key, moves, receipt)

    def _write_blocking(self, channel: Channel, ticket: Ticket, moves: Sequence[BlockMove]) -> WriteReceipt:
        if not self._may_write():
            raise errors.DeadlineExceeded("the lease on granted memory ran out")
        return channel.write(ticket, moves, time.monotonic() + self._deadline_s)

    def _placed(self, outbound: Outbound, key: HandoffKey, moves: Sequence[BlockMove], receipt: WriteReceipt) -> None:
        if key == outbound.key:
            outbound.wrote(receipt.bytes, len(moves), receipt.seconds)
        self._end(key)
        outbound.delivery.written(key, moves)
        self._events.wrote(outbound)

    def _failed(
        self, outbound: Outbound, key: HandoffKey, moves: Sequence[BlockMove], error: errors.BatonError
    ) -> None:
        self._end(key)
        outbound.delivery.write_failed(key, moves, str(error))
        self._events.write_failed(outbound, key, error)

    def _end(self, key: HandoffKey) -> None:
        self.under_way[key] -= 1
        if not self.under_way[key]:
            del self.under_way[key]

    def _settle(
        self, outbound: Outbound, key: HandoffKey, moves: Sequence[BlockMove], done: asyncio.Future[WriteReceipt]
    ) -> None:
        """Ends a batch that outlived its channel. An error of its write says nothing: we closed the channel."""
        if done.cancelled() or done.exception() is not None:
            self._failed(outbound, key, moves, errors.PeerClosed("the control stream ended during the write"))
        else:
            self._placed(outbound, key, moves, done.result())
