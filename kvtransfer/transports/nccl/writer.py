"""The writer's side of `nccl`: a batch is agreed over the control connection, then both sides post it, then it counts.

A communicator that fails in the middle of a batch is aborted and made anew, once, within the write's deadline.
"""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from baton.errors import DeadlineExceeded, PeerClosed
from baton.spec import ProcessRef
from kvtransfer.handoffs.messages import BlockMove, Ticket
from kvtransfer.transports.base import BlockMemory, Writer
from kvtransfer.transports.channel import BlockChannel
from kvtransfer.transports.nccl import wire
from kvtransfer.transports.nccl.issuer import Issuer, Link
from kvtransfer.transports.nccl.seam import SENDER, UNIQUE_ID_BYTES, Span
from kvtransfer.transports.sockets import Stream, WriterSocket, connect_to, left, split_endpoint
from kvtransfer.transports.wire import ELSEWHERE, agree, refused

ABORT_SECONDS = 5.0
Fence = Callable[[], object | None]


class NcclWriter(Writer):
    """`memory` is on the device of `issuer`, which the caller closes after this.

    `fence` is called on the thread that calls `write`: it gives an event that the engine has recorded after the work
    that fills the newest blocks, and the sends wait for it on the device; None for a pool that is filled synchronously.
    """

    kind = "nccl"

    def __init__(self, memory: BlockMemory, incarnation: str, issuer: Issuer, fence: Fence = lambda: None) -> None:
        self.memory = memory
        self.incarnation = incarnation
        self.issuer = issuer
        self.fence = fence

    def connect(self, endpoint: str, peer: ProcessRef, deadline: float) -> NcclChannel:
        return NcclChannel(self, endpoint, peer, deadline)


class Control(WriterSocket):
    """The writer's end of a control connection, with news from the issuing thread.

    Used by one thread at a time, but for `news` and `shut_down`. The constructor connects, and raises as
    `Writer.connect` says."""

    def __init__(self, endpoint: str, peer: ProcessRef, deadline: float) -> None:
        super().__init__(Stream(connect_to(endpoint, peer.name, deadline)), peer.name)
        self._address, self._token = split_endpoint(endpoint)
        self._lock = threading.Lock()
        self._news = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._open = True

    def shake_hands(self, block_bytes: int, incarnation: str, deadline: float) -> None:
        hello = wire.HELLO.pack(wire.MAGIC, wire.VERSION, block_bytes) + self._token + incarnation.encode()
        self.put(wire.frame(wire.NcclOp.HELLO, hello), deadline)
        while (message := self.message()) is None:
            self.wait_for_any(deadline)
        op, body = message
        if op is not wire.NcclOp.WELCOME or len(body) != wire.HELLO.size:
            raise PeerClosed(f"{self.name} is no receiver of ours")
        magic, version, theirs = wire.HELLO.unpack(body)
        if magic == ELSEWHERE:
            raise PeerClosed(f"{self.name} is not at {self._address}: another receiver answers there")
        if magic != wire.MAGIC:
            raise PeerClosed(f"{self.name} is no receiver of ours")
        agree(("nccl version", wire.VERSION, version), ("block_bytes", block_bytes, theirs))

    def put(self, message: bytes, deadline: float) -> None:
        self.send([memoryview(message)], deadline)

    def message(self) -> tuple[wire.NcclOp, bytes] | None:
        """The next whole message, if one has come. Raises `PeerClosed` for malformed bytes."""
        try:
            return wire.take_frame(self.received)
        except wire.Malformed as error:
            raise PeerClosed(f"{self.name} sent {error}") from error

    def wait_for_any(self, deadline: float) -> None:
        """Until a message or news of the issuing thread comes."""
        self.wait(deadline, also=self._news)
        self._clear()

    def wait_for_news(self, seconds: float) -> None:
        """Until the issuing thread has news; works also when the connection has ended."""
        poller = select.poll()
        poller.register(self._news, select.POLLIN)
        poller.poll(seconds * 1000)
        self._clear()

    def news(self) -> None:
        """Ends a wait; from any thread, also after `close`."""
        with self._lock:
            if self._open:
                os.eventfd_write(self._news, 1)

    def close(self) -> None:
        """Idempotent."""
        super().close()
        with self._lock:
            if self._open:
                self._open = False
                os.close(self._news)

    def _clear(self) -> None:
        with suppress(BlockingIOError):
            os.eventfd_read(self._news)


class _PairFailed(Exception):
    """The communicator failed, and this attempt at the batch with it."""


@dataclass(slots=True)
class _Attempt:
    ticket: Ticket
    fence: object | None
    deadline: float
    serial: int
    group: list[Span]
    ready: bool = False
    posted: int = 0  # groups of the link when this one is done; 0 before it is posted
    sent: bool = False
    done: bool = False


class NcclChannel(BlockChannel):
    """After its deadline a `write` takes up to `ABORT_SECONDS` more, until the device no longer reads the source.
    Blocks that an abort leaves to be read for longer never count: the receiver was not told that they were sent."""

    def __init__(self, writer: NcclWriter, endpoint: str, peer: ProcessRef, deadline: float) -> None:
        super().__init__(writer.memory, peer)
        self._source = writer.memory
        self._issuer = writer.issuer
        self._fence = writer.fence
        self._serial = 0
        self._pair = 0
        self._link: Link | None = None
        self._control = Control(endpoint, peer, deadline)
        try:
            self._control.shake_hands(self._block_bytes, writer.incarnation, deadline)
        except BaseException:
            self.close()
            raise

    def _move(self, ticket: Ticket, moves: Sequence[BlockMove], deadline: float) -> None:
        fence = self._fence()
        runs = wire.runs_of(moves)
        for first in range(0, len(runs), wire.MAX_RUNS):
            self._deliver(ticket, runs[first : first + wire.MAX_RUNS], fence, deadline)

    def _give_up(self) -> None:
        self._control.shut_down()
        self._drop_link("the write was given up")

    def _interrupt(self) -> None:
        self._control.shut_down()

    def _free(self) -> None:
        self._drop_link("the channel is closed")
        self._control.close()

    def _deliver(
        self, ticket: Ticket, runs: Sequence[tuple[wire.BlockRun, int]], fence: object | None, deadline: float
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
        self, ticket: Ticket, runs: Sequence[tuple[wire.BlockRun, int]], fence: object | None, deadline: float
    ) -> None:
        size = self._block_bytes
        group = [Span(self._source.address + source * size, run.blocks * size) for run, source in runs]
        self._serial += 1
        attempt = _Attempt(ticket, fence, deadline, self._serial, group)
        seconds = left(deadline, self._control.late)
        self._control.put(wire.pack_batch(self._serial, seconds, ticket, [run for run, _ in runs]), deadline)
        while True:
            while (message := self._control.message()) is not None:  # some may be here since the last batch
                self._take(attempt, *message)
            self._advance(attempt)
            if attempt.done:
                return
            self._control.wait_for_any(deadline)

    def _take(self, attempt: _Attempt, op: wire.NcclOp, body: bytes) -> None:
        try:
            if op is wire.NcclOp.PAIR:
                self._drop_link("the receiver began another communicator")
                self._pair, unique_id = wire.unpack_number(body, UNIQUE_ID_BYTES)
                self._link = self._issuer.open(SENDER, unique_id, attempt.deadline, lambda _link: self._control.news())
            elif op is wire.NcclOp.GONE:
                if wire.unpack_number(body)[0] == self._pair:
                    self._drop_link("the receiver ended the communicator")
            elif op is wire.NcclOp.ANSWER:
                self._answered(attempt, *wire.unpack_answer(body))
            else:
                raise PeerClosed(f"{self._peer.name} sent no answer of ours")
        except wire.Malformed as error:
            raise PeerClosed(f"{self._peer.name} sent {error}") from error

    def _answered(self, attempt: _Attempt, serial: int, status: wire.BatchStatus, text: str) -> None:
        if serial != attempt.serial:
            return  # of a batch that was given up
        if status is wire.BatchStatus.REFUSED:
            if attempt.posted:
                self._forget_link("the batch was refused")
            raise refused(attempt.ticket.key, text)
        if status is wire.BatchStatus.FAILED:
            raise _PairFailed(text)
        attempt.ready = True
        attempt.done = status is wire.BatchStatus.DONE

    def _advance(self, attempt: _Attempt) -> None:
        link = self._link
        if link is None:
            return
        if link.failure:
            if link.late and time.monotonic() >= attempt.deadline:
                raise DeadlineExceeded(self._control.late)
            raise _PairFailed(link.failure)
        if attempt.ready and not attempt.posted and link.opened:
            attempt.posted = link.posted + 1
            self._issuer.post(link, attempt.group, attempt.fence, attempt.deadline)
        if attempt.posted and not attempt.sent and link.completed >= attempt.posted:
            attempt.sent = True
            self._control.put(wire.pack_number(wire.NcclOp.SENT, attempt.serial), attempt.deadline)

    def _forget_link(self, why: str) -> None:
        """Aborts our end, and tells the receiver, so that it aborts its own."""
        if self._link is not None:
            self._drop_link(why)
            self._control.put(wire.pack_number(wire.NcclOp.GONE, self._pair), time.monotonic() + ABORT_SECONDS)

    def _drop_link(self, why: str) -> None:
        """Returns when the device reads the source no longer, or after `ABORT_SECONDS`."""
        link, self._link = self._link, None
        if link is None:
            return
        self._issuer.abort(link, why)
        until = time.monotonic() + ABORT_SECONDS
        while not link.gone and (seconds := until - time.monotonic()) > 0:
            self._control.wait_for_news(seconds)
