"""One writer's control connection, on the receiver of a NIXL pair, and the agent that its blocks come through.

    HELLO -> NAME -> BATCH -> TABLE -> WRITING -> BATCH ...      from WRITING to the notice, bytes may come
                                    -> BATCH ...                 a refused batch: nothing comes

The agent is asked for progress in WRITING only, and is closed with the connection: after that nothing can come.
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
from kvtransfer.transports.nixl import wire
from kvtransfer.transports.nixl.agent import NixlAgent
from kvtransfer.transports.tcp import wire as tcp_wire
from kvtransfer.transports.tcp.connection import Broken
from kvtransfer.transports.wire import Identity, unpack_identity


class Phase(Enum):
    HELLO = auto()
    NAME = auto()
    BATCH = auto()
    TABLE = auto()
    WRITING = auto()


class NixlConnection:
    """Belongs to the reactor's thread. `find` gives the ticket that is admitted for a key."""

    def __init__(
        self,
        peer: socket.socket,
        memory: PoolMemory,
        flags: wire.Flags,
        events: ReceiverEvents,
        find: Callable[[HandoffKey], Ticket | None],
    ) -> None:
        self.socket = peer
        self.phase = Phase.HELLO
        self.identity: Identity | None = None
        self._memory = memory
        self._flags = flags
        self._events = events
        self._find = find
        self._agent: NixlAgent | None = None
        self._batches = 0
        self._entries: list[tcp_wire.Entry] = []
        self._incarnation = ""
        self._buffer = bytearray()
        self._wanted = wire.HELLO.size

    @property
    def idle(self) -> bool:
        """Between two batches: the peer owes nothing."""
        return self.phase is Phase.BATCH and not self._buffer

    def writes(self, key: HandoffKey) -> bool:
        """Whether bytes of this handoff may be on their way."""
        return self.phase is Phase.WRITING and self.identity is not None and self.identity.key == key

    def read(self) -> None:
        """Take what has come. Raises `Broken` when the connection is to be closed."""
        try:
            data = self.socket.recv(self._wanted - len(self._buffer) if self._wanted else 1)
        except BlockingIOError:
            return
        except OSError as error:
            raise Broken(str(error)) from error
        if not data or not self._wanted:
            raise Broken("the writer closed the connection" if not data else "the writer speaks out of turn")
        self._buffer += data
        if len(self._buffer) == self._wanted:
            message, self._buffer = self._buffer, bytearray()
            {
                Phase.HELLO: self._hello,
                Phase.NAME: self._name,
                Phase.BATCH: self._batch,
                Phase.TABLE: self._table,
            }[self.phase](message)

    def progress(self) -> None:
        """To be called over and over in WRITING: places bytes, and answers once the write is whole."""
        assert self._agent is not None
        for notice in self._agent.notices():
            if self.phase is not Phase.WRITING or notice != wire.NOTICE.pack(self._batches):
                raise Broken("a notice of no batch")
            self._written()

    def close(self) -> None:
        """After this nothing of the writer can be placed through this connection."""
        self.socket.close()
        if self._agent is not None:
            self._agent.close()
            self._agent = None

    def _hello(self, message: bytearray) -> None:
        magic, version, flags, block_bytes, length = wire.HELLO.unpack(message)
        mine = self._memory.layout.block_bytes
        if magic != wire.MAGIC or not length:
            raise Broken("not a writer of ours")
        if (version, flags, block_bytes) != (wire.VERSION, self._flags, mine):
            self._send(wire.pack_welcome(self._flags, mine, wire.Target(0, 0, b"")))  # it sees what differs
            raise Broken("the handshake differs")
        self._go(Phase.NAME, length)

    def _name(self, message: bytearray) -> None:
        self._incarnation = message.decode(errors="replace")
        self._agent = NixlAgent(f"receiver of {self._incarnation}", self._memory)
        target = wire.Target(self._memory.address, self._memory.blocks, self._agent.metadata)
        self._send(wire.pack_welcome(self._flags, self._memory.layout.block_bytes, target))
        self._go(Phase.BATCH, tcp_wire.BATCH_BYTES)

    def _batch(self, message: bytearray) -> None:
        magic, count = tcp_wire.PREFIX.unpack_from(message)
        if magic != tcp_wire.MAGIC or not 1 <= count <= tcp_wire.MAX_COUNT:
            raise Broken("not a batch")
        self.identity = unpack_identity(message, tcp_wire.PREFIX.size)
        self._go(Phase.TABLE, count * tcp_wire.ENTRY.size)

    def _table(self, message: bytearray) -> None:
        assert self.identity is not None
        self._entries = tcp_wire.unpack_table(message)
        ticket = self._find(self.identity.key)
        why = entries_refusal(ticket, self.identity, self._entries)
        if why is None and ticket is not None and ticket.writer != self._incarnation:
            why = "the ticket belongs to another process"
        if why is not None:
            self._answer(wire.Status.REFUSED, why)
            return
        self._go(Phase.WRITING, 0)
        self._send(wire.pack_ack(wire.Status.OK))

    def _written(self) -> None:
        assert self.identity is not None
        self._batches += 1
        wrong = next((entry for entry in self._entries if not self._intact(entry)), None)
        if wrong is not None:
            self._answer(wire.Status.CHECKSUM, f"block {wrong.index} arrived with other bytes than were sent")
            return
        indices = [entry.index for entry in self._entries]
        self._events.landed(self.identity.key, self.identity.generation, indices)
        self._answer(wire.Status.OK, "")

    def _answer(self, status: wire.Status, text: str) -> None:
        """The end of a batch."""
        assert self.identity is not None
        if status is not wire.Status.OK:
            self._events.refused_write(self.identity.key, text)
        self._send(wire.pack_ack(status, text))
        self.identity = None
        self._go(Phase.BATCH, tcp_wire.BATCH_BYTES)

    def _intact(self, entry: tcp_wire.Entry) -> bool:
        if wire.Flags.CHECKSUMS not in self._flags:
            return True
        return zlib.crc32(self._memory.block(entry.destination)) == entry.checksum

    def _go(self, phase: Phase, wanted: int) -> None:
        self.phase, self._wanted = phase, wanted

    def _send(self, data: bytes) -> None:
        try:
            sent = self.socket.send(data)
        except OSError as error:
            raise Broken(str(error)) from error
        if sent != len(data):
            raise Broken("the writer does not read its answers")
