"""The writer's side of TCP: batches go out by vectored sends from the pool; each is acknowledged once in place.

Where one connection is slower than the network, several channels to a receiver act as one.
"""

from __future__ import annotations

import ssl
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait

from baton.errors import BatonError, ChecksumMismatch, Mismatch, PeerClosed, WriteRefused
from baton.spec import ProcessRef
from kvtransfer.blocks.memory import PoolMemory
from kvtransfer.handoffs.messages import BlockMove, Ticket
from kvtransfer.transports.base import Channel, Writer, WriteReceipt
from kvtransfer.transports.channel import BlockChannel
from kvtransfer.transports.sockets import Stream, WriterSocket, connect_to, split_endpoint
from kvtransfer.transports.tcp import wire
from kvtransfer.transports.tcp.tls import TlsContexts, tcp_flags
from kvtransfer.transports.wire import ELSEWHERE, MAX_COUNT, BlockEntry, Flags, agree, checksum, pack_batch

REFUSALS = (WriteRefused, ChecksumMismatch)


class TcpWriter(Writer):
    """Opens `connections` to each receiver. `checksums` and whether there is `tls` must be the same on both sides."""

    kind = "tcp"

    def __init__(
        self, memory: PoolMemory, *, checksums: bool = False, tls: TlsContexts | None = None, connections: int = 1
    ) -> None:
        self.memory = memory
        self.flags = tcp_flags(checksums, tls)
        self.tls = tls
        self._count = connections

    def connect(self, endpoint: str, peer: ProcessRef, deadline: float) -> Channel:
        channels: list[Channel] = []
        try:
            for _ in range(self._count):
                channels.append(TcpChannel(self, endpoint, peer, deadline))  # noqa: PERF401
        except BaseException:
            for channel in channels:
                channel.close()
            raise
        return channels[0] if len(channels) == 1 else ParallelChannel(channels)


class TcpChannel(BlockChannel):
    def __init__(self, writer: TcpWriter, endpoint: str, peer: ProcessRef, deadline: float) -> None:
        super().__init__(writer.memory, peer)
        self._source = writer.memory
        self._flags = writer.flags
        connected = connect_to(endpoint, peer.name, deadline)
        stream = Stream(connected) if writer.tls is None else writer.tls.connect(connected)
        self._stream = WriterSocket(stream, peer.name)
        try:
            self._handshake(endpoint, deadline)
        except BaseException:
            self.close()
            raise

    def _move(self, ticket: Ticket, moves: Sequence[BlockMove], deadline: float) -> None:
        batches = [moves[first : first + MAX_COUNT] for first in range(0, len(moves), MAX_COUNT)]
        for batch in batches:
            entries = [BlockEntry(m.index, m.destination, checksum(self._source, m.source, self._flags)) for m in batch]
            payload = [self._source.block(move.source) for move in batch]
            self._stream.send([memoryview(pack_batch(ticket, entries)), *payload], deadline)
        failures = [failure for _ in batches if (failure := self._stream.read_ack(ticket, deadline)) is not None]
        if failures:
            raise failures[0]

    def _interrupt(self) -> None:
        self._stream.shut_down()

    def _free(self) -> None:
        self._stream.close()

    def _handshake(self, endpoint: str, deadline: float) -> None:
        address, token = split_endpoint(endpoint)
        hello = wire.HELLO.pack(wire.MAGIC, wire.VERSION, self._flags, self._block_bytes)
        try:
            self._stream.send([memoryview(hello + token)], deadline)
            answer = self._stream.read(wire.HELLO.size, deadline)
        except PeerClosed as error:
            # The receiver has answered in plain.
            if isinstance(error.__cause__, ssl.SSLError) and error.__cause__.reason == "WRONG_VERSION_NUMBER":
                raise Mismatch("tls", "on", "off") from error
            raise
        magic, version, flags, block_bytes = wire.HELLO.unpack(answer)
        if magic == ELSEWHERE:
            raise PeerClosed(f"{self._peer.name} is not at {address}: another receiver answers there")
        if magic != wire.MAGIC:
            raise PeerClosed(f"{self._peer.name} is no receiver of ours")
        agree(("tcp version", wire.VERSION, version), ("block_bytes", self._block_bytes, block_bytes))
        if (flags ^ self._flags) & Flags.TLS:
            raise Mismatch("tls", "off", "on")
        agree(("checksums", self._flags, flags))


class ParallelChannel:
    """Implements `Channel`: each write is shared out, and over when every share is. It owns the channels.

    Where one of them breaks all are closed, so that the write ends at once with no share still under way.
    """

    def __init__(self, channels: Sequence[Channel]) -> None:
        assert len(channels) > 1, "one channel needs no company"
        self._channels = list(channels)
        self._threads = ThreadPoolExecutor(len(channels), thread_name_prefix="kv-share")

    def write(self, ticket: Ticket, moves: Sequence[BlockMove], deadline: float) -> WriteReceipt:
        started = time.monotonic()
        size = -(-len(moves) // len(self._channels)) or 1
        shares = [moves[first : first + size] for first in range(0, len(moves), size)] or [moves]
        futures = [
            self._threads.submit(self._share, channel, ticket, share, deadline)
            for channel, share in zip(self._channels, shares, strict=False)
        ]
        wait(futures)  # each ends by the deadline
        errors = [error for future in futures if (error := future.exception()) is not None]
        for error in sorted(errors, key=lambda error: isinstance(error, REFUSALS)):
            raise error  # the one that broke the channel, else a refusal
        return WriteReceipt(sum(future.result() for future in futures), time.monotonic() - started)

    def close(self) -> None:
        for channel in self._channels:
            channel.close()
        self._threads.shutdown()

    def _share(self, channel: Channel, ticket: Ticket, moves: Sequence[BlockMove], deadline: float) -> int:
        try:
            return channel.write(ticket, moves, deadline).bytes
        except REFUSALS:
            raise
        except BatonError:
            for other in self._channels:
                other.close()
            raise
