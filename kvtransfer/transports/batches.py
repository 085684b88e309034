"""One writer's connection on the receivers of `tcp` and `nixl`: batches are checked, filled and answered.

    HELLO -> TOKEN -> BATCH -> TABLE -> FILLING -> BATCH ...   the blocks' bytes go straight into the granted blocks
                                     -> DRAIN   -> BATCH ...   the bytes of a refused batch, read and dropped

A connection needs memory for one table and one bounded scratch buffer, however fast or slow its peer is.
"""

from __future__ import annotations

import socket
from abc import abstractmethod
from collections.abc import Callable
from enum import Enum, auto
from typing import ClassVar

from baton.spec import HandoffKey
from kvtransfer.blocks.memory import PoolMemory
from kvtransfer.handoffs.messages import Ticket
from kvtransfer.transports import wire
from kvtransfer.transports.base import ReceiverEvents
from kvtransfer.transports.receiver import Broken, WriterConnection
from kvtransfer.transports.sockets import rest
from kvtransfer.transports.wire import BlockEntry, Flags, Identity, Status, corrupt, intact, refusal

TURN_BYTES = 16 * 2**20
"""Read from one connection before the others have their turn."""


class BatchPhase(Enum):
    HELLO = auto()
    TOKEN = auto()  # with nixl the writer's name follows it
    BATCH = auto()
    TABLE = auto()
    FILLING = auto()
    DRAIN = auto()  # tcp only


class BatchConnection(WriterConnection):
    """`find` gives the ticket that is admitted for a key. `token` is the receiver's. `incarnation` is the writer's,
    where it has to name it. `HELLO_BYTES` is the size of the first message."""

    HELLO_BYTES: ClassVar[int]
    incarnation: str | None = None
    _vectors: list[memoryview]
    _step: Callable[[], None]

    def __init__(
        self,
        peer: socket.socket,
        memory: PoolMemory,
        flags: Flags,
        events: ReceiverEvents,
        find: Callable[[HandoffKey], Ticket | None],
        token: bytes,
    ) -> None:
        super().__init__(peer)
        self._memory = memory
        self._flags = flags
        self._events = events
        self._find = find
        self._token = token
        self._identity: Identity | None = None
        self._entries: list[BlockEntry] = []
        self._expect(BatchPhase.HELLO, self.HELLO_BYTES, self._hello)

    @property
    def idle(self) -> bool:
        return self.phase is BatchPhase.BATCH and len(self._vectors[0]) == wire.BATCH_BYTES

    def writes(self, key: HandoffKey) -> bool:
        return self.phase is BatchPhase.FILLING and self._identity is not None and self._identity.key == key

    def read(self) -> None:
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
                self._step()

    def close(self) -> None:
        self._vectors = []
        super().close()

    @abstractmethod
    def _hello(self) -> None:
        """Answers the first message, and expects the next one."""

    @abstractmethod
    def _granted(self) -> None:
        """The batch may be written: lets its bytes come, and calls `_filled` when all are there."""

    @abstractmethod
    def _refused(self, why: str) -> None:
        """The batch may not be written: calls `_answer`, once no more bytes of it come."""

    def _expect(self, phase: BatchPhase, size: int, step: Callable[[], None]) -> None:
        """Goes to `phase`, whose message has `size` bytes."""
        self._message = bytearray(size)
        self._fill(phase, [memoryview(self._message)], step)

    def _fill(self, phase: BatchPhase, vectors: list[memoryview], step: Callable[[], None]) -> None:
        """Goes to `phase`, which ends with `step` once all of `vectors` is filled."""
        self.phase, self._vectors, self._step = phase, vectors, step

    def _batch(self) -> None:
        magic, count = wire.PREFIX.unpack_from(self._message)
        if magic != wire.BATCH_MAGIC or not 1 <= count <= wire.MAX_COUNT:
            raise Broken("not a batch")
        self._identity = wire.unpack_identity(self._message, wire.PREFIX.size)
        self._expect(BatchPhase.TABLE, count * wire.ENTRY.size, self._table)

    def _table(self) -> None:
        assert self._identity is not None
        self._entries = [BlockEntry(*fields) for fields in wire.ENTRY.iter_unpack(self._message)]
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
        self.send(wire.pack_ack(status, text))
        self._identity, self._entries = None, []
        self._next_batch()

    def _next_batch(self) -> None:
        self._expect(BatchPhase.BATCH, wire.BATCH_BYTES, self._batch)
