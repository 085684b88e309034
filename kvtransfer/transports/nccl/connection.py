"""One writer's control connection, on the receiver: its communicator, and the one batch that may be under way.

batch --checked--> agreed --link opened--> posted --event--> received --SENT--> landed
             |                  |             |                  |
          refused               +-- revoked, failed, gone: nothing of it counts
"""

from __future__ import annotations

import hmac
import socket
import time
from collections.abc import Callable
from functools import partial

from baton.spec import HandoffKey
from kvtransfer.handoffs.messages import Ticket
from kvtransfer.transports.base import BlockMemory, ReceiverEvents
from kvtransfer.transports.nccl import wire
from kvtransfer.transports.nccl.issuer import Issuer, Link
from kvtransfer.transports.nccl.seam import RECEIVER, Span
from kvtransfer.transports.receiver import Broken, WriterConnection
from kvtransfer.transports.wire import ELSEWHERE, REVOKED, TOKEN_BYTES, refusal

READ_BYTES = 16 * 1024
MAX_BATCH_SECONDS = 600.0


class NcclConnection(WriterConnection):
    """`find` gives the ticket that is admitted for a key. `post` posts the receives of a batch of a handoff, until a
    deadline, and returns which group of the link they are. `changed` is called on the issuing thread. `token` is the
    receiver's."""

    def __init__(
        self,
        peer: socket.socket,
        memory: BlockMemory,
        events: ReceiverEvents,
        issuer: Issuer,
        find: Callable[[HandoffKey], Ticket | None],
        post: Callable[[Link, HandoffKey, list[Span], float], int],
        changed: Callable[[NcclConnection, Link], None],
        token: bytes,
    ) -> None:
        super().__init__(peer)
        self.incarnation = ""
        self.batch: wire.RunBatch | None = None
        self.until = 0.0
        """The batch's deadline, on this side's clock."""
        self.link: Link | None = None
        self._memory = memory
        self._events = events
        self._issuer = issuer
        self._find = find
        self._post = post
        self._changed = changed
        self._token = token
        self._buffer = bytearray()
        self._number = 0  # of the communicator within this connection
        self._announced = False
        self._posted = 0  # groups of the link once this batch is done; 0 before it is posted
        self._ready = False
        self._sent = False

    @property
    def idle(self) -> bool:
        return self.batch is None and not self._buffer

    def read(self) -> None:
        data = self.receive(READ_BYTES)
        if data is None:
            return
        self._buffer += data
        try:
            while (message := wire.take_frame(self._buffer)) is not None:
                self._take(*message)
        except wire.Malformed as error:
            raise Broken(f"the writer sent {error}") from error

    def advance(self) -> None:
        """Goes as far as the communicator allows; called after each of its changes. Raises `Broken`."""
        if self.link is not None and self.link.failure:
            self._link_failed(self.link)
        if self.link is None and self.batch is not None:
            self._number += 1
            self._announced = False
            self.link = self._issuer.open(RECEIVER, b"", self.until, partial(self._changed, self))
        link = self.link
        if link is None:
            return
        if link.unique_id and not self._announced:
            self._announced = True
            self.send(wire.pack_number(wire.NcclOp.PAIR, self._number, link.unique_id))
        if self.batch is not None:
            self._advance_batch(link, self.batch)

    def revoke(self, key: HandoffKey) -> None:
        """Nothing more of this handoff counts; receives that are posted end with their communicator."""
        if self.batch is None or self.batch.identity.key != key:
            return
        batch, link = self.batch, self.link
        if link is not None and self._posted > link.completed:
            self._end_link(REVOKED)
        self._refuse(batch, REVOKED)

    def close(self) -> None:
        self.batch = None
        self._abort("the writer is gone")
        super().close()

    def _take(self, op: wire.NcclOp, body: bytes) -> None:
        if op is wire.NcclOp.HELLO and not self.incarnation:
            self._hello(body)
        elif not self.incarnation:
            raise Broken("not a writer of ours")
        elif op is wire.NcclOp.BATCH:
            self._check(wire.unpack_batch(body))
        elif op is wire.NcclOp.SENT:
            self._writer_sent(wire.unpack_number(body)[0])
        elif op is wire.NcclOp.GONE:
            if wire.unpack_number(body)[0] == self._number:  # the writer's end is aborted; it sends the batch again
                self.batch = None
                self._abort("the writer ended the communicator")
        else:
            raise Broken(f"a writer sends no {op.name}")

    def _hello(self, body: bytes) -> None:
        if len(body) <= wire.HELLO.size:
            raise Broken("not a writer of ours")
        magic, version, block_bytes = wire.HELLO.unpack_from(body)
        mine = self._memory.layout.block_bytes
        token, name = body[wire.HELLO.size :][:TOKEN_BYTES], body[wire.HELLO.size + TOKEN_BYTES :]
        if magic != wire.MAGIC or (version == wire.VERSION and not name):
            raise Broken("not a writer of ours")
        meant = version != wire.VERSION or hmac.compare_digest(token, self._token)
        answer = wire.HELLO.pack(wire.MAGIC if meant else ELSEWHERE, wire.VERSION, mine)
        self.send(wire.frame(wire.NcclOp.WELCOME, answer))
        if not meant:
            raise Broken("the writer means another receiver")
        if (version, block_bytes) != (wire.VERSION, mine):
            raise Broken("the handshake differs")
        self.incarnation = name.decode(errors="replace")

    def _check(self, batch: wire.RunBatch) -> None:
        if self.batch is not None:
            raise Broken("a batch before the last one was over")
        identity = batch.identity
        why = refusal(self._find(identity.key), identity, batch.targets, self.incarnation)
        if why is not None:
            self._events.refused_write(identity.key, why)
            self._refuse(batch, why)
            return
        self.batch = batch
        self.until = time.monotonic() + min(batch.seconds, MAX_BATCH_SECONDS)
        self._posted, self._ready, self._sent = 0, False, False
        self.advance()

    def _advance_batch(self, link: Link, batch: wire.RunBatch) -> None:
        if not self._posted and link.opened:
            size = self._memory.layout.block_bytes
            group = [Span(self._memory.address + run.destination * size, run.blocks * size) for run in batch.runs]
            self._posted = self._post(link, batch.identity.key, group, self.until)
        if not self._posted:
            return
        if not self._ready and link.posted >= self._posted:
            self._ready = True
            self.send(wire.pack_answer(batch.serial, wire.BatchStatus.READY))
        if self._sent and link.completed >= self._posted:
            self.batch = None
            indices = [index for index, _ in batch.targets]
            self._events.landed(batch.identity.key, batch.identity.generation, indices)
            self.send(wire.pack_answer(batch.serial, wire.BatchStatus.DONE))

    def _writer_sent(self, serial: int) -> None:
        if self.batch is None or serial != self.batch.serial:
            return  # revoked meanwhile
        if not self._ready:
            raise Broken("a batch was sent before it was agreed")
        self._sent = True
        self.advance()

    def _link_failed(self, link: Link) -> None:
        """Nothing of its batch counts."""
        batch, self.batch = self.batch, None
        self._end_link(link.failure)
        if batch is not None:
            self.send(wire.pack_answer(batch.serial, wire.BatchStatus.FAILED, link.failure))

    def _end_link(self, why: str) -> None:
        self._abort(why)
        self.send(wire.pack_number(wire.NcclOp.GONE, self._number))

    def _abort(self, why: str) -> None:
        link, self.link = self.link, None
        if link is not None:
            self._issuer.abort(link, why)

    def _refuse(self, batch: wire.RunBatch, why: str) -> None:
        self.batch = None
        self.send(wire.pack_answer(batch.serial, wire.BatchStatus.REFUSED, why))
