"""One writer's connection, on the receiver: what has been read of the current message, and where the rest goes.

    HELLO -> BATCH -> TABLE -> PAYLOAD -> BATCH ...     the payload goes straight into the granted blocks
                            -> DRAIN   -> BATCH ...     a refused batch: its bytes are read and dropped

A connection needs memory for one table and one bounded scratch buffer, however fast or slow its peer is.
"""

from __future__ import annotations

import socket
import zlib
from collections.abc import Callable
from enum import Enum, auto

from baton.spec import HandoffKey
from kvtransfer.blocks.memory import PoolMemory
from kvtransfer.handoffs.messages import Ticket
from kvtransfer.transports.base import ReceiverEvents
from kvtransfer.transports.check import entries_refusal
from kvtransfer.transports.tcp import wire
from kvtransfer.transports.tcp.stream import CLIENT_HELLO, Stream, TlsContexts, TlsStream
from kvtransfer.transports.wire import Identity, unpack_identity

TURN_BYTES = 16 * 2**20  # then the others have their turn
SCRATCH_BYTES = 256 * 1024


class Phase(Enum):
    HELLO = auto()
    BATCH = auto()
    TABLE = auto()
    PAYLOAD = auto()
    DRAIN = auto()


class Broken(Exception):
    """The connection is of no more use: the peer left, or does not speak the protocol."""


class TcpConnection:
    """Belongs to the reactor's thread. `find` gives the ticket that is admitted for a key."""

    def __init__(
        self,
        peer: socket.socket,
        tls: TlsContexts | None,
        memory: PoolMemory,
        flags: wire.Flags,
        events: ReceiverEvents,
        find: Callable[[HandoffKey], Ticket | None],
    ) -> None:
        self.stream = Stream(peer)
        self._tls = tls
        self.phase = Phase.HELLO
        self.identity: Identity | None = None
        self._memory = memory
        self._flags = flags
        self._events = events
        self._find = find
        self._head = bytearray(max(wire.HELLO.size, wire.BATCH_BYTES))
        self._scratch: bytearray | None = None
        self._entries: list[wire.Entry] = []
        self._count = 0
        self._drain = 0
        self._why = ""
        self._vectors: list[memoryview] = [memoryview(self._head)[: wire.HELLO.size]]

    @property
    def idle(self) -> bool:
        """Between two batches: the peer owes nothing."""
        return self.phase is Phase.BATCH and len(self._vectors[0]) == wire.BATCH_BYTES

    def writes(self, key: HandoffKey) -> bool:
        """Whether bytes of this handoff are being placed."""
        return self.phase is Phase.PAYLOAD and self.identity is not None and self.identity.key == key

    def read(self) -> None:
        """Take what has come, up to one turn's worth. Raises `Broken` when the connection is to be closed."""
        if self._tls is not None:
            self._choose(self._tls)
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
            self._advance(count)

    def close(self) -> None:
        self._vectors = []
        self.stream.close()

    def _choose(self, tls: TlsContexts) -> None:
        """TLS, unless the writer starts without: then it is told so, in plain, by the flags of our HELLO."""
        try:
            first = self.stream.socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return
        except OSError as error:
            raise Broken(str(error)) from error
        if CLIENT_HELLO.startswith(first):
            self.stream = tls.accept(self.stream.socket)
        self._tls = None

    def _advance(self, count: int) -> None:
        """`count` more bytes are in `_vectors`; when those are full, go to the next phase."""
        if self.phase is Phase.DRAIN:
            self._drain -= count
            self._vectors = self._drain_vectors()
        else:
            self._vectors = rest(self._vectors, count)
        while not self._vectors:
            {
                Phase.HELLO: self._hello,
                Phase.BATCH: self._batch,
                Phase.TABLE: self._table,
                Phase.PAYLOAD: self._placed,
                Phase.DRAIN: self._drained,
            }[self.phase]()

    def _hello(self) -> None:
        magic, version, flags, block_bytes = wire.HELLO.unpack_from(self._head)
        mine = self._memory.layout.block_bytes
        if magic != wire.MAGIC and not self._head.startswith(CLIENT_HELLO):
            raise Broken("not a writer of ours")
        self._send(wire.HELLO.pack(wire.MAGIC, wire.VERSION, self._flags, mine))  # in plain to one that wants TLS
        secret = isinstance(self.stream, TlsStream)
        if (secret, magic, version, flags, block_bytes) != (
            wire.Flags.TLS in self._flags,
            wire.MAGIC,
            wire.VERSION,
            self._flags,
            mine,
        ):
            self.stream.drain()  # what is left unread would reset the connection, and our answer with it
            raise Broken("the handshake differs")
        self._next_batch()

    def _next_batch(self) -> None:
        self.phase = Phase.BATCH
        self.identity = None
        self._entries = []
        self._scratch = None
        self._vectors = [memoryview(self._head)[: wire.BATCH_BYTES]]

    def _batch(self) -> None:
        magic, self._count = wire.PREFIX.unpack_from(self._head)
        if magic != wire.MAGIC or not 1 <= self._count <= wire.MAX_COUNT:
            raise Broken("not a batch")
        self.identity = unpack_identity(self._head, wire.PREFIX.size)
        self._scratch = bytearray(self._count * wire.ENTRY.size)
        self.phase = Phase.TABLE
        self._vectors = [memoryview(self._scratch)]

    def _table(self) -> None:
        assert self.identity is not None
        assert self._scratch is not None
        self._entries = wire.unpack_table(self._scratch)
        ticket = self._find(self.identity.key)
        why = entries_refusal(ticket, self.identity, self._entries)
        if why is None:
            self.phase = Phase.PAYLOAD
            self._vectors = [self._memory.block(entry.destination) for entry in self._entries]
            return
        self._why = why
        self._events.refused_write(self.identity.key, why)
        self.phase = Phase.DRAIN
        self._drain = self._count * self._memory.layout.block_bytes
        self._scratch = bytearray(min(SCRATCH_BYTES, self._drain))
        self._vectors = self._drain_vectors()

    def _drain_vectors(self) -> list[memoryview]:
        assert self._scratch is not None
        return [memoryview(self._scratch)[: self._drain]] if self._drain else []

    def _drained(self) -> None:
        self._send(wire.pack_ack(wire.Status.REFUSED, self._why))
        self._next_batch()

    def _placed(self) -> None:
        assert self.identity is not None
        wrong = next((e for e in self._entries if not self._intact(e)), None)
        if wrong is not None:
            text = f"block {wrong.index} arrived with other bytes than were sent"
            self._events.refused_write(self.identity.key, text)
            self._send(wire.pack_ack(wire.Status.CHECKSUM, text))
        else:
            indices = [entry.index for entry in self._entries]
            self._events.landed(self.identity.key, self.identity.generation, indices)
            self._send(wire.pack_ack(wire.Status.OK))
        self._next_batch()

    def _intact(self, entry: wire.Entry) -> bool:
        if wire.Flags.CHECKSUMS not in self._flags:
            return True
        return zlib.crc32(self._memory.block(entry.destination)) == entry.checksum

    def _send(self, data: bytes) -> None:
        """Answers are small, and a writer reads them: one that lets them pile up is broken."""
        try:
            sent = self.stream.send([memoryview(data)])
        except OSError as error:
            raise Broken(str(error)) from error
        if sent != len(data):
            raise Broken("the writer does not read its answers")


def rest(vectors: list[memoryview], count: int) -> list[memoryview]:
    """What is left of `vectors` after their first `count` bytes."""
    for position, vector in enumerate(vectors):
        if count < len(vector):
            return [vector[count:], *vectors[position + 1 :]]
        count -= len(vector)
    return []
