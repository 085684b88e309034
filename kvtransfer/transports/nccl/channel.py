"""The writer's side of `nccl`: a batch is agreed over the control connection, then both sides post it, then it counts.

A communicator that fails in the middle of a batch is aborted and made anew, once, within the write's deadline.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from baton.errors import BatonError, DeadlineExceeded, PeerClosed, WriteRefused
from baton.spec import ProcessRef
from kvtransfer.handoffs.messages import Ticket
from kvtransfer.transports.base import BlockMove, WriteReceipt
from kvtransfer.transports.check import plan
from kvtransfer.transports.nccl import wire
from kvtransfer.transports.nccl.control import Control
from kvtransfer.transports.nccl.issuer import Issuer, Link
from kvtransfer.transports.nccl.seam import SENDER, BlockMemory, Span

ABORT_SECONDS = 5.0
Fence = Callable[[], object | None]


class _PairFailed(Exception):
    """The communicator failed, and this attempt at the batch with it."""


class _Attempt:
    """One try at one batch: what the receiver has answered so far."""

    def __init__(self, serial: int, group: list[Span]) -> None:
        self.serial = serial
        self.group = group
        self.ready = False
        self.posted = 0  # groups of the link when this one is done; 0 before it is posted
        self.sent = False
        self.done = False


class NcclChannel:
    """Implements `Channel`. Raises from the constructor as `Transport.connect` says.

    After its deadline a `write` takes up to `ABORT_SECONDS` more, until the device reads the source no longer. Should
    the abort take even longer, what is still read counts nowhere: the receiver was never told that it was sent.
    """

    def __init__(
        self,
        source: BlockMemory,
        issuer: Issuer,
        incarnation: str,
        endpoint: str,
        peer: ProcessRef,
        deadline: float,
        fence: Fence,
    ) -> None:
        self._source = source
        self._issuer = issuer
        self._peer = peer
        self._fence = fence
        self._closing = False
        self._broken = False
        self._busy = threading.Lock()
        self._serial = 0
        self._pair = 0
        self._link: Link | None = None
        self._control = Control(endpoint, peer, deadline)
        try:
            self._control.shake_hands(source.layout.block_bytes, incarnation, deadline)
        except BaseException:
            self.close()
            raise

    def write(self, ticket: Ticket, moves: Sequence[BlockMove], deadline: float) -> WriteReceipt:
        started = time.monotonic()
        plan(ticket, moves, self._source.blocks)
        fence = self._fence()
        runs = wire.runs_of(moves)
        with self._busy:
            if self._broken or self._closing:
                raise PeerClosed(f"the connection to {self._peer.name} is closed")
            try:
                for first in range(0, len(runs), wire.MAX_RUNS):
                    self._deliver(ticket, runs[first : first + wire.MAX_RUNS], fence, deadline)
            except WriteRefused:
                raise
            except BatonError:
                self._broken = True  # answers are still on the way
                self._control.shut_down()
                self._drop_link("the write was given up")
                raise
            finally:
                if self._link is not None:
                    self._link.wanted = False
        return WriteReceipt(len(moves) * self._source.layout.block_bytes, time.monotonic() - started)

    def close(self) -> None:
        self._closing = True
        self._control.shut_down()  # wakes a write under way
        with self._busy:
            self._drop_link("the channel is closed")
            self._control.close()

    def _deliver(
        self, ticket: Ticket, runs: Sequence[tuple[wire.Run, int]], fence: object | None, deadline: float
    ) -> None:
        """One batch, tried again once on a new communicator when the first one fails."""
        try:
            self._attempt(ticket, runs, fence, deadline)
        except _PairFailed as first:
            self._forget_link(str(first))
            try:
                self._attempt(ticket, runs, fence, deadline)
            except _PairFailed as second:
                raise PeerClosed(f"{self._peer.name}: {second}; before that: {first}") from None

    def _attempt(
        self, ticket: Ticket, runs: Sequence[tuple[wire.Run, int]], fence: object | None, deadline: float
    ) -> None:
        size = self._source.layout.block_bytes
        group = [Span(self._source.address + source * size, run.blocks * size) for run, source in runs]
        self._serial += 1
        attempt = _Attempt(self._serial, group)
        if self._link is not None:
            self._link.wanted = True
            if self._link.failure:
                self._forget_link(self._link.failure)  # evicted since the last write
        batch = wire.pack_batch(self._serial, self._control.left(deadline), ticket, [run for run, _ in runs])
        self._control.send(batch, deadline)
        while True:
            while (message := self._control.message()) is not None:  # some may be here since the last batch
                self._take(ticket, attempt, *message, deadline)
            self._advance(attempt, fence, deadline)
            if attempt.done:
                return
            self._control.wait(deadline)

    def _take(self, ticket: Ticket, attempt: _Attempt, op: wire.Op, body: bytes, deadline: float) -> None:
        try:
            self._act(ticket, attempt, op, body, deadline)
        except wire.Malformed as error:
            raise PeerClosed(f"{self._peer.name} sent {error}") from error

    def _act(self, ticket: Ticket, attempt: _Attempt, op: wire.Op, body: bytes, deadline: float) -> None:
        if op is wire.Op.PAIR:
            self._drop_link("the receiver began another communicator")
            self._pair, unique_id = wire.unpack_pair(body)
            self._link = self._issuer.open(SENDER, unique_id, deadline, lambda _link: self._control.news())
        elif op is wire.Op.GONE:
            if wire.unpack_number(body)[0] == self._pair:
                self._drop_link("the receiver ended the communicator")
        elif op is wire.Op.ANSWER:
            self._answered(ticket, attempt, *wire.unpack_answer(body))
        else:
            raise PeerClosed(f"{self._peer.name} sent no answer of ours")

    def _answered(self, ticket: Ticket, attempt: _Attempt, serial: int, status: wire.Status, text: str) -> None:
        if serial != attempt.serial:
            return  # of a batch that was given up
        if status is wire.Status.REFUSED:
            if attempt.posted:
                self._forget_link("the batch was refused")
            raise WriteRefused(f"{ticket.key}: {text}")
        if status is wire.Status.FAILED:
            raise _PairFailed(text)
        attempt.ready = True
        attempt.done = status is wire.Status.DONE

    def _advance(self, attempt: _Attempt, fence: object | None, deadline: float) -> None:
        link = self._link
        if link is None:
            return
        if link.failure:
            if link.late and time.monotonic() >= deadline:
                raise DeadlineExceeded(self._control.late)
            raise _PairFailed(link.failure)
        if attempt.ready and not attempt.posted and link.opened:
            attempt.posted = link.posted + 1
            self._issuer.post(link, attempt.group, fence, deadline)
        if attempt.posted and not attempt.sent and link.completed >= attempt.posted:
            attempt.sent = True
            self._control.send(wire.pack_number(wire.Op.SENT, attempt.serial), deadline)

    def _forget_link(self, why: str) -> None:
        """Abort our end, and tell the receiver, so that it aborts its own."""
        if self._link is not None:
            self._drop_link(why)
            self._control.send(wire.pack_number(wire.Op.GONE, self._pair), time.monotonic() + ABORT_SECONDS)

    def _drop_link(self, why: str) -> None:
        """Returns when the device reads the source no longer, as far as that can be waited for."""
        link, self._link = self._link, None
        if link is None:
            return
        self._issuer.abort(link, why)
        until = time.monotonic() + ABORT_SECONDS
        while not link.gone and (left := until - time.monotonic()) > 0:
            self._control.wait_for_news(left)
