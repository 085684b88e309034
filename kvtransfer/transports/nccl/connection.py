"""One writer's control connection, on the receiver: its communicator, and the one batch that may be under way.

batch --checked--> agreed --link opened--> posted --event--> received --SENT--> landed
             |                  |             |                  |
          refused               +-- revoked, failed, gone: nothing of it counts
"""

from __future__ import annotations

import socket
import time
from typing import Protocol

from baton.spec import HandoffKey
from kvtransfer.handoffs.messages import Ticket
from kvtransfer.transports.base import ReceiverEvents
from kvtransfer.transports.check import identity_refusal
from kvtransfer.transports.nccl import wire
from kvtransfer.transports.nccl.issuer import Link
from kvtransfer.transports.nccl.seam import BlockMemory, Span

READ_BYTES = 16 * 1024
MAX_BATCH_SECONDS = 600.0


class Broken(Exception):
    """The connection is of no more use: the peer left, or does not speak the protocol."""


class Pairs(Protocol):
    """The receiving transport, as its connections see it."""

    def find(self, key: HandoffKey) -> Ticket | None:
        """The ticket that is admitted for a key."""

    def open(self, connection: NcclConnection, deadline: float) -> Link:
        """Begin a communicator with this writer."""

    def post(self, link: Link, key: HandoffKey, group: list[Span], deadline: float) -> int:
        """Post the receives of a batch of this handoff; which group of the link they are."""

    def abort(self, link: Link, why: str) -> None:
        """End a communicator."""


class NcclConnection:
    """Belongs to the reactor's thread."""

    def __init__(self, peer: socket.socket, memory: BlockMemory, events: ReceiverEvents, pairs: Pairs) -> None:
        self.socket = peer
        self.incarnation = ""
        self.batch: wire.Batch | None = None
        self.until = 0.0
        """The batch's deadline, on this side's clock."""
        self.link: Link | None = None
        self._memory = memory
        self._events = events
        self._pairs = pairs
        self._buffer = bytearray()
        self._number = 0  # of the communicator within this connection
        self._announced = False
        self._posted = 0  # groups of the link once this batch is done; 0 before it is posted
        self._ready = False
        self._sent = False

    @property
    def idle(self) -> bool:
        """Between two batches: the peer owes nothing."""
        return self.batch is None and not self._buffer

    def read(self) -> None:
        """Take what has come. Raises `Broken` when the connection is to be closed."""
        try:
            data = self.socket.recv(READ_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            raise Broken(str(error)) from error
        if not data:
            raise Broken("the writer closed the connection")
        self._buffer += data
        try:
            while (message := wire.take_frame(self._buffer)) is not None:
                self._take(*message)
        except wire.Malformed as error:
            raise Broken(f"the writer sent {error}") from error

    def advance(self) -> None:
        """Go as far as the communicator allows; called after each of its changes. Raises `Broken`."""
        link = self.link
        if link is not None and link.failure:
            self._link_failed(link)
            link = self.link
        if link is None and self.batch is not None:
            link = self._open()
        if link is None:
            return
        if link.unique_id and not self._announced:
            self._announced = True
            self._send(wire.pack_number(wire.Op.PAIR, self._number, link.unique_id))
        if self.batch is not None:
            self._advance_batch(link, self.batch)

    def revoke(self, key: HandoffKey) -> None:
        """Nothing more of this handoff counts; receives that are posted end with their communicator."""
        if self.batch is None or self.batch.identity.key != key:
            return
        batch, link = self.batch, self.link
        if link is not None and self._posted > link.completed:
            self._end_link("the handoff was revoked")
        self._refuse(batch, "the handoff was revoked")

    def close(self) -> None:
        """Nothing more of this writer counts."""
        self.batch = None
        if self.link is not None:
            self._pairs.abort(self.link, "the writer is gone")
            self.link = None
        self.socket.close()

    def _take(self, op: wire.Op, body: bytes) -> None:
        if op is wire.Op.HELLO and not self.incarnation:
            self._hello(body)
        elif not self.incarnation:
            raise Broken("not a writer of ours")
        elif op is wire.Op.BATCH:
            self._check(wire.unpack_batch(body))
        elif op is wire.Op.SENT:
            self._writer_sent(wire.unpack_number(body)[0])
        elif op is wire.Op.GONE:
            if wire.unpack_number(body)[0] == self._number:
                self._writer_aborted()
        else:
            raise Broken(f"a writer sends no {op.name}")

    def _hello(self, body: bytes) -> None:
        if len(body) <= wire.HELLO.size:
            raise Broken("not a writer of ours")
        magic, version, block_bytes = wire.HELLO.unpack_from(body)
        mine = self._memory.layout.block_bytes
        if magic != wire.MAGIC:
            raise Broken("not a writer of ours")
        self._send(wire.frame(wire.Op.WELCOME, wire.HELLO.pack(wire.MAGIC, wire.VERSION, mine)))
        if (version, block_bytes) != (wire.VERSION, mine):
            raise Broken("the handshake differs")
        self.incarnation = body[wire.HELLO.size :].decode(errors="replace")

    def _check(self, batch: wire.Batch) -> None:
        if self.batch is not None:
            raise Broken("a batch before the last one was over")
        why = self._refusal(batch)
        if why is not None:
            self._events.refused_write(batch.identity.key, why)
            self._refuse(batch, why)
            return
        self.batch = batch
        self.until = time.monotonic() + min(batch.seconds, MAX_BATCH_SECONDS)
        self._posted, self._ready, self._sent = 0, False, False
        if self.link is not None:
            self.link.wanted = True
        self.advance()

    def _refusal(self, batch: wire.Batch) -> str | None:
        identity = batch.identity
        ticket = self._pairs.find(identity.key)
        why = identity_refusal(ticket, identity.generation, identity.write_token)
        if why is not None or ticket is None:
            return why
        if ticket.writer != self.incarnation:
            return "the ticket belongs to another process"
        for run in batch.runs:
            for i in range(run.blocks):
                if ticket.destination(run.first + i) != run.destination + i:
                    return f"block {run.first + i} may not go to {run.destination + i}"
        return None

    def _advance_batch(self, link: Link, batch: wire.Batch) -> None:
        if not self._posted and link.opened:
            size = self._memory.layout.block_bytes
            group = [Span(self._memory.address + run.destination * size, run.blocks * size) for run in batch.runs]
            self._posted = self._pairs.post(link, batch.identity.key, group, self.until)
        if not self._posted:
            return
        if not self._ready and link.posted >= self._posted:
            self._ready = True
            self._send(wire.pack_answer(batch.serial, wire.Status.READY))
        if self._sent and link.completed >= self._posted:
            self._over()
            self._events.landed(batch.identity.key, batch.identity.generation, batch.indices)
            self._send(wire.pack_answer(batch.serial, wire.Status.DONE))

    def _open(self) -> Link:
        self._number += 1
        self._announced = False
        self.link = self._pairs.open(self, self.until)
        return self.link

    def _writer_sent(self, serial: int) -> None:
        if self.batch is None or serial != self.batch.serial:
            return  # revoked meanwhile
        if not self._ready:
            raise Broken("a batch was sent before it was agreed")
        self._sent = True
        self.advance()

    def _writer_aborted(self) -> None:
        """Its end of the communicator is gone; what it was sending it sends again."""
        if self.batch is not None:
            self._over()
        if self.link is not None:
            self._pairs.abort(self.link, "the writer ended the communicator")
            self.link = None

    def _link_failed(self, link: Link) -> None:
        """A batch that was not posted yet waits for the next communicator; one that was counts for nothing."""
        batch, late = self.batch, link.late
        self._end_link(link.failure)
        if batch is not None and (self._posted or late or not link.opened):
            self._over()
            self._send(wire.pack_answer(batch.serial, wire.Status.FAILED, link.failure))

    def _end_link(self, why: str) -> None:
        assert self.link is not None
        self._pairs.abort(self.link, why)
        self.link = None
        self._send(wire.pack_number(wire.Op.GONE, self._number))

    def _refuse(self, batch: wire.Batch, why: str) -> None:
        self._over()
        self._send(wire.pack_answer(batch.serial, wire.Status.REFUSED, why))

    def _over(self) -> None:
        self.batch = None
        if self.link is not None:
            self.link.wanted = False

    def _send(self, data: bytes) -> None:
        """Messages are small, and a writer reads them: one that lets them pile up is broken."""
        try:
            sent = self.socket.send(data)
        except OSError as error:
            raise Broken(str(error)) from error
        if sent != len(data):
            raise Broken("the writer does not read its answers")
