"""The writer's side of TCP: batches go out by vectored sends from the pool; each is acknowledged once in place."""

from __future__ import annotations

import select
import ssl
import threading
import time
import zlib
from collections.abc import Sequence

from baton.errors import (
    BatonError,
    ChecksumMismatch,
    DeadlineExceeded,
    Mismatch,
    PeerClosed,
    TransferError,
    WriteRefused,
)
from baton.spec import ProcessRef
from kvtransfer.blocks.memory import PoolMemory
from kvtransfer.handoffs.messages import Ticket
from kvtransfer.transports.base import BlockMove, WriteReceipt
from kvtransfer.transports.check import plan
from kvtransfer.transports.sockets import connect_to, left
from kvtransfer.transports.tcp import wire
from kvtransfer.transports.tcp.connection import rest
from kvtransfer.transports.tcp.stream import Stream, TlsContexts

READ_BYTES = 4096


class TcpChannel:
    """Implements `Channel`. Raises from the constructor as `Transport.connect` says."""

    def __init__(
        self,
        source: PoolMemory,
        flags: wire.Flags,
        endpoint: str,
        peer: ProcessRef,
        deadline: float,
        tls: TlsContexts | None = None,
    ) -> None:
        self._source = source
        self._flags = flags
        self._peer = peer
        self._closing = False
        self._broken = False
        self._busy = threading.Lock()
        self._answers = bytearray()
        self._incoming = bytearray(READ_BYTES)
        connected = connect_to(endpoint, peer.name, deadline)
        connected.setblocking(False)
        self._stream = Stream(connected) if tls is None else tls.connect(connected)
        try:
            self._handshake(deadline)
        except BaseException:
            self.close()
            raise

    def write(self, ticket: Ticket, moves: Sequence[BlockMove], deadline: float) -> WriteReceipt:
        started = time.monotonic()
        plan(ticket, moves, self._source.blocks)
        with self._busy:
            if self._broken or self._closing:
                raise PeerClosed(f"the connection to {self._peer.name} is closed")
            try:
                batches = [moves[first : first + wire.MAX_COUNT] for first in range(0, len(moves), wire.MAX_COUNT)]
                for batch in batches:
                    self._send([memoryview(self._header(ticket, batch)), *self._payload(batch)], deadline)
                failures = [failure for _ in batches if (failure := self._acknowledged(ticket, deadline)) is not None]
            except BatonError:
                self._broken = True  # an answer, or half a batch, is still on the way
                raise
        if failures:
            raise failures[0]
        return WriteReceipt(len(moves) * self._source.layout.block_bytes, time.monotonic() - started)

    def close(self) -> None:
        self._closing = True
        self._stream.shutdown()  # wakes a write under way
        with self._busy:
            self._stream.close()

    def _handshake(self, deadline: float) -> None:
        size = self._source.layout.block_bytes
        try:
            self._send([memoryview(wire.HELLO.pack(wire.MAGIC, wire.VERSION, self._flags, size))], deadline)
            answer = self._read(wire.HELLO.size, deadline)
        except PeerClosed as error:
            self._explain(error)
            raise
        magic, version, flags, theirs = wire.HELLO.unpack(answer)
        if magic != wire.MAGIC:
            raise PeerClosed(f"{self._peer.name} is no receiver of ours")
        if version != wire.VERSION:
            raise Mismatch("tcp version", str(wire.VERSION), str(version))
        if theirs != size:
            raise Mismatch("block_bytes", str(size), str(theirs))
        if (flags ^ self._flags) & wire.Flags.TLS:
            raise Mismatch("tls", "off", "on")
        if flags != self._flags:
            raise Mismatch("checksums", str(self._flags), str(wire.Flags(flags)))

    def _explain(self, error: PeerClosed) -> None:
        """Raises `Mismatch` where the receiver answers in plain what was asked under TLS."""
        if isinstance(error.__cause__, ssl.SSLError) and error.__cause__.reason == "WRONG_VERSION_NUMBER":
            raise Mismatch("tls", "on", "off") from error

    def _header(self, ticket: Ticket, moves: Sequence[BlockMove]) -> bytes:
        checked = wire.Flags.CHECKSUMS in self._flags
        entries = [
            wire.Entry(m.index, m.destination, zlib.crc32(self._source.block(m.source)) if checked else 0)
            for m in moves
        ]
        return wire.pack_batch(ticket, entries)

    def _payload(self, moves: Sequence[BlockMove]) -> list[memoryview]:
        return [self._source.block(move.source) for move in moves]

    def _acknowledged(self, ticket: Ticket, deadline: float) -> TransferError | None:
        """Read one batch's answer; what went wrong with it, if anything."""
        magic, status, length = wire.ACK.unpack(self._read(wire.ACK.size, deadline))
        if magic != wire.MAGIC or length > wire.MAX_TEXT:
            raise PeerClosed(f"{self._peer.name} sent no answer of ours")
        text = f"{ticket.key}: {self._read(length, deadline).decode(errors='replace')}"
        if status == wire.Status.OK:
            return None
        return ChecksumMismatch(text) if status == wire.Status.CHECKSUM else WriteRefused(text)

    def _send(self, vectors: list[memoryview], deadline: float) -> None:
        while vectors:
            try:
                count = self._stream.send(vectors)
            except BlockingIOError:
                self._wait(select.POLLOUT, deadline)
            except OSError as error:
                raise PeerClosed(f"{self._peer.name}: {error}") from error
            else:
                vectors = rest(vectors, count)

    def _read(self, size: int, deadline: float) -> bytes:
        while len(self._answers) < size:
            self._wait(select.POLLIN, deadline)
            self._receive()
        data = bytes(self._answers[:size])
        del self._answers[:size]
        return data

    def _receive(self) -> None:
        try:
            count = self._stream.receive_into([memoryview(self._incoming)])
        except BlockingIOError:
            return
        except OSError as error:
            raise PeerClosed(f"{self._peer.name}: {error}") from error
        if not count:
            raise PeerClosed(f"{self._peer.name} closed the connection")
        self._answers += self._incoming[:count]

    def _wait(self, event: int, deadline: float) -> None:
        """Until the socket is ready. Answers that come meanwhile are read, so that the receiver can always send one."""
        poller = select.poll()
        poller.register(self._stream.socket, event | select.POLLIN)
        ready = poller.poll(left(deadline) * 1000)
        if self._closing:
            raise PeerClosed("the channel is closed")
        if not ready:
            raise DeadlineExceeded(f"the write to {self._peer.name} did not end in time")
        if event != select.POLLIN and ready[0][1] & select.POLLIN:
            self._receive()
