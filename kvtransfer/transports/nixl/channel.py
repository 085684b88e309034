"""The writer's side of a NIXL pair: each batch is announced, written once the receiver agrees, and answered."""

from __future__ import annotations

import select
import socket
import threading
import time
import zlib
from collections.abc import Sequence
from contextlib import suppress
from functools import partial

from baton.errors import BatonError, ChecksumMismatch, DeadlineExceeded, Mismatch, PeerClosed, WriteRefused
from baton.spec import ProcessRef
from kvtransfer.blocks.memory import PoolMemory
from kvtransfer.handoffs.messages import Ticket
from kvtransfer.transports.base import BlockMove, WriteReceipt
from kvtransfer.transports.check import plan
from kvtransfer.transports.nixl import wire
from kvtransfer.transports.nixl.agent import NixlAgent
from kvtransfer.transports.sockets import connect_to, left
from kvtransfer.transports.tcp import wire as tcp_wire


class NixlChannel:
    """Implements `Channel`. Raises from the constructor as `Transport.connect` says."""

    def __init__(
        self,
        source: PoolMemory,
        incarnation: str,
        flags: wire.Flags,
        endpoint: str,
        peer: ProcessRef,
        deadline: float,
    ) -> None:
        self._source = source
        self._flags = flags
        self._peer = peer
        self._closing = False
        self._batches = 0
        self._busy = threading.Lock()
        self._socket = connect_to(endpoint, peer.name, deadline)
        self._agent: NixlAgent | None = None
        try:
            self._target = self._handshake(incarnation, deadline)
            if not self._target.blocks > 0:
                raise PeerClosed(f"{peer.name} has no pool")
            self._agent = NixlAgent(f"writer {incarnation}", source)
            self._agent.know(self._target.metadata)
        except BaseException:
            self.close()
            raise

    def write(self, ticket: Ticket, moves: Sequence[BlockMove], deadline: float) -> WriteReceipt:
        started = time.monotonic()
        plan(ticket, moves, self._source.blocks)
        with self._busy:
            if self._agent is None or self._closing:
                raise PeerClosed(f"the connection to {self._peer.name} is closed")
            try:
                for first in range(0, len(moves), tcp_wire.MAX_COUNT):
                    self._batch(self._agent, ticket, moves[first : first + tcp_wire.MAX_COUNT], deadline)
            except (WriteRefused, ChecksumMismatch):
                raise
            except BatonError:
                self._end()  # before we raise: nothing more is read from the source, and nothing more arrives
                raise
        return WriteReceipt(len(moves) * self._source.layout.block_bytes, time.monotonic() - started)

    def close(self) -> None:
        self._closing = True
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes a write that waits for an answer
        with self._busy:
            self._end()
            self._socket.close()

    def _end(self) -> None:
        agent, self._agent = self._agent, None
        if agent is not None:
            agent.close()
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def _batch(self, agent: NixlAgent, ticket: Ticket, moves: Sequence[BlockMove], deadline: float) -> None:
        size = self._source.layout.block_bytes
        outside = next((m.destination for m in moves if not 0 <= m.destination < self._target.blocks), None)
        if outside is not None:
            raise WriteRefused(f"block {outside} of {self._target.blocks}")
        self._send(wire.pack_batch(ticket, [self._entry(move) for move in moves]), deadline)
        self._acknowledged(ticket, deadline)
        agent.write(
            [(self._source.address + m.source * size, size, 0) for m in moves],
            [(self._target.address + m.destination * size, size, 0) for m in moves],
            wire.NOTICE.pack(self._batches),
            partial(self._go_on, deadline),
        )
        self._batches += 1
        while not self._readable(0.0005):  # the notice may need us to be on its way
            self._go_on(deadline)
            agent.notices()
        self._acknowledged(ticket, deadline)

    def _entry(self, move: BlockMove) -> tcp_wire.Entry:
        checked = wire.Flags.CHECKSUMS in self._flags
        return tcp_wire.Entry(
            move.index, move.destination, zlib.crc32(self._source.block(move.source)) if checked else 0
        )

    def _go_on(self, deadline: float) -> None:
        """Raises when there is no point any more."""
        if self._closing:
            raise PeerClosed("the channel is closed")
        if time.monotonic() >= deadline:
            raise DeadlineExceeded(f"the write to {self._peer.name} did not end in time")
        if self._readable(0.0):
            with suppress(OSError):
                if self._socket.recv(1, socket.MSG_PEEK):
                    return  # its answer, a little ahead of NIXL's news
            raise PeerClosed(f"{self._peer.name} closed the connection")

    def _readable(self, seconds: float) -> bool:
        poller = select.poll()
        poller.register(self._socket, select.POLLIN)
        return bool(poller.poll(seconds * 1e3))

    def _handshake(self, incarnation: str, deadline: float) -> wire.Target:
        size = self._source.layout.block_bytes
        self._send(wire.pack_hello(self._flags, size, incarnation), deadline)
        head = self._read(wire.WELCOME.size, deadline)
        magic, version, flags, theirs, blocks, address, length = wire.WELCOME.unpack(head)
        if magic != wire.MAGIC or length > wire.MAX_METADATA:
            raise PeerClosed(f"{self._peer.name} is no receiver of ours")
        if version != wire.VERSION:
            raise Mismatch("nixl version", str(wire.VERSION), str(version))
        if theirs != size:
            raise Mismatch("block_bytes", str(size), str(theirs))
        if flags != self._flags:
            raise Mismatch("checksums", str(self._flags), str(wire.Flags(flags)))
        return wire.Target(address, blocks, self._read(length, deadline))

    def _acknowledged(self, ticket: Ticket, deadline: float) -> None:
        magic, status, length = tcp_wire.ACK.unpack(self._read(tcp_wire.ACK.size, deadline))
        if magic != tcp_wire.MAGIC or length > tcp_wire.MAX_TEXT:
            raise PeerClosed(f"{self._peer.name} sent no answer of ours")
        text = f"{ticket.key}: {self._read(length, deadline).decode(errors='replace')}"
        if status == wire.Status.CHECKSUM:
            raise ChecksumMismatch(text)
        if status != wire.Status.OK:
            raise WriteRefused(text)

    def _send(self, data: bytes, deadline: float) -> None:
        self._socket.settimeout(left(deadline))
        try:
            self._socket.sendall(data)
        except TimeoutError as error:
            raise DeadlineExceeded(f"the write to {self._peer.name} did not end in time") from error
        except OSError as error:
            raise PeerClosed(f"{self._peer.name}: {error}") from error

    def _read(self, size: int, deadline: float) -> bytes:
        data = b""
        while len(data) < size:
            self._socket.settimeout(left(deadline))
            try:
                piece = self._socket.recv(size - len(data))
            except TimeoutError as error:
                raise DeadlineExceeded(f"{self._peer.name} did not answer in time") from error
            except OSError as error:
                raise PeerClosed(f"{self._peer.name}: {error}") from error
            if not piece:
                raise PeerClosed(f"{self._peer.name} closed the connection")
            data += piece
        return data
