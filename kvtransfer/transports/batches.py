"""One writer's connection as `tcp` and `nixl` have it on the receiver: batches that are checked, filled and answered.

    HELLO -> BATCH -> TABLE -> FILLING -> BATCH ...     the blocks' bytes go straight into the granted blocks
                            -> DRAIN   -> BATCH ...     a refused batch whose bytes come all the same: read and dropped

A connection needs memory for one table and one bounded scratch buffer, however fast or slow its peer is.
"""

from __future__ import annotations

import socket
from abc import abstractmethod
from collections.abc import Callable
from enum import Enum, auto

from baton.spec import HandoffKey
from kvtransfer.blocks.memory import PoolMemory
from kvtransfer.handoffs.messages import Ticket
from kvtransfer.transports import wire
from kvtransfer.transports.base import ReceiverEvents
from kvtransfer.transports.check import corrupt, intact, refusal
from kvtransfer.transports.receiver import Broken, WriterConnection
from kvtransfer.transports.streams import rest
from kvtransfer.transports.wire import BlockEntry, Flags, Identity, Status

TURN_BYTES = 16 * 2**20  # then the others have their turn


class BatchPhase(Enum):
    HELLO = auto()
    NAME = auto()  # nixl only
    BATCH = auto()
    TABLE = auto()
    FILLING = auto()
    DRAIN = auto()  # tcp only


class BatchConnection(WriterConnection):
    """`find` gives the ticket that is admitted for a key. `incarnation` is the writer's, where it has to name it."""

    incarnation: str | None = None

    def __init__(
        self,
        peer: socket.socket,
        memory: PoolMemory,
        flags: Flags,
        events: ReceiverEvents,
        find: Callable[[HandoffKey], Ticket | None],
        hello_bytes: int,
    ) -> None:
        super().__init__(peer)
        self._memory = memory
        self._flags = flags
        self._events = events
        self._find = find
        self._identity: Identity | None = None
        self._entries: list[BlockEntry] = []
        self._vectors: list[memoryview] = []
        self._steps = {BatchPhase.HELLO: self._hello, BatchPhase.BATCH: self._batch, BatchPhase.TABLE: self._table}
        """Called when all of `_vectors` is filled."""
        self._expect(BatchPhase.HELLO, hello_bytes)

    @property
    def idle(self) -> bool:
        return self.phase is BatchPhase.BATCH and len(self._vectors[0]) == wire.BATCH_BYTES

    def writes(self, key: HandoffKey) -> bool:
        return self.phase is BatchPhase.FILLING and self._identity is not None and self._identity.key == key

    def read(self) -> None:
        """Up to one turn's worth."""
        left = TURN_BYTES
        while left > 0 or self.stream.pending:
            try:
                count = self.stream.receive_into(self._vectors)
            except BlockingIOError:
                return
            except OSError as error:
                raise Broken(str(error)) from error
            if count == 0:
                raise Broken("the writer closed the connection")
            left -= count
            self._vectors = rest(self._vectors, count)
            while not self._vectors:
                self._steps[self.phase]()

    def close(self) -> None:
        self._vectors = []
        super().close()

    @abstractmethod
    def _hello(self) -> None:
        """Answer the first message, and expect the next one."""

    @abstractmethod
    def _granted(self) -> None:
        """The batch may be written: let its bytes come, and call `_filled` when all are there."""

    @abstractmethod
    def _refused(self, why: str) -> None:
        """The batch may not be written: call `_answer`, once no more bytes of it come."""

    def _expect(self, phase: BatchPhase, size: int) -> None:
        """Go to `phase`, whose message has so many bytes."""
        self.phase = phase
        self._message = bytearray(size)
        self._vectors = [memoryview(self._message)]

    def _batch(self) -> None:
        magic, count = wire.PREFIX.unpack_from(self._message)
        if magic != wire.BATCH_MAGIC or not 1 <= count <= wire.MAX_COUNT:
            raise Broken("not a batch")
        self._identity = wire.unpack_identity(self._message, wire.PREFIX.size)
        self._expect(BatchPhase.TABLE, count * wire.ENTRY.size)

    def _table(self) -> None:
        assert self._identity is not None
        self._entries = wire.unpack_table(self._message)
        targets = ((entry.index, entry.destination) for entry in self._entries)
        why = refusal(self._find(self._identity.key), self._identity, targets, self.incarnation)
        if why is None:
            self._granted()
        else:
            self._events.refused_write(self._identity.key, why)
            self._refused(why)

    def _filled(self) -> None:
        assert self._identity is not None
        key, generation, _ = self._identity
        for entry in self._entries:
            if not intact(self._memory, entry.destination, entry.checksum, self._flags):
                why = corrupt(entry.index)
                self._events.refused_write(key, why)
                self._answer(Status.CHECKSUM, why)
                return
        self._events.landed(key, generation, [entry.index for entry in self._entries])
        self._answer(Status.OK)

    def _answer(self, status: Status, text: str = "") -> None:
        """The end of a batch."""
        self.send(wire.pack_ack(status, text))
        self._identity, self._entries = None, []
        self._expect(BatchPhase.BATCH, wire.BATCH_BYTES)
