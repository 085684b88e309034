"""The writer's side of a NIXL pair: each batch is announced, written once the receiver agrees, and answered."""

from __future__ import annotations

import select
import time
from collections.abc import Sequence
from functools import partial

from baton.errors import DeadlineExceeded, PeerClosed, WriteRefused
from baton.spec import ProcessRef
from kvtransfer.blocks.memory import PoolMemory
from kvtransfer.handoffs.messages import BlockMove, Ticket
from kvtransfer.transports.base import Writer
from kvtransfer.transports.channel import BlockChannel
from kvtransfer.transports.nixl import wire
from kvtransfer.transports.nixl.agent import NixlAgent, require
from kvtransfer.transports.sockets import Stream, WriterSocket, connect_to, split_endpoint
from kvtransfer.transports.wire import ELSEWHERE, MAX_COUNT, BlockEntry, Flags, agree, checksum, pack_batch

ANSWER_SECONDS = 0.0005  # then NIXL is asked for progress again: its notice may need us to be on its way


class NixlWriter(Writer):
    """`checksums` must be the same on both sides. Raises `ConfigError` as `agent.require` does."""

    kind = "nixl"

    def __init__(self, memory: PoolMemory, incarnation: str, *, checksums: bool = False) -> None:
        require()
        self.memory = memory
        self.incarnation = incarnation
        self.flags = Flags.CHECKSUMS if checksums else Flags(0)

    def connect(self, endpoint: str, peer: ProcessRef, deadline: float) -> NixlChannel:
        return NixlChannel(self, endpoint, peer, deadline)


class NixlChannel(BlockChannel):
    def __init__(self, writer: NixlWriter, endpoint: str, peer: ProcessRef, deadline: float) -> None:
        super().__init__(writer.memory, peer)
        self._source = writer.memory
        self._flags = writer.flags
        self._batches = 0
        self._agent: NixlAgent | None = None
        self._stream = WriterSocket(Stream(connect_to(endpoint, peer.name, deadline)), peer.name)
        try:
            metadata = self._handshake(writer.incarnation, endpoint, deadline)
            self._agent = NixlAgent(f"writer {writer.incarnation}", writer.memory)
            self._agent.know(metadata)
        except BaseException:
            self.close()
            raise

    def _move(self, ticket: Ticket, moves: Sequence[BlockMove], deadline: float) -> None:
        assert self._agent is not None
        for first in range(0, len(moves), MAX_COUNT):
            self._batch(self._agent, ticket, moves[first : first + MAX_COUNT], deadline)

    def _give_up(self) -> None:
        """Nothing more is read from the source, and nothing more arrives."""
        agent, self._agent = self._agent, None
        if agent is not None:
            agent.close()
        self._stream.shut_down()

    def _interrupt(self) -> None:
        self._stream.shut_down()

    def _free(self) -> None:
        self._give_up()
        self._stream.close()

    def _batch(self, agent: NixlAgent, ticket: Ticket, moves: Sequence[BlockMove], deadline: float) -> None:
        size = self._block_bytes
        outside = next((m.destination for m in moves if not 0 <= m.destination < self._target_blocks), None)
        if outside is not None:
            raise WriteRefused(f"block {outside} of {self._target_blocks}")
        entries = [BlockEntry(m.index, m.destination, checksum(self._source, m.source, self._flags)) for m in moves]
        self._stream.send([memoryview(pack_batch(ticket, entries))], deadline)
        self._acknowledged(ticket, deadline)
        agent.write(
            [(self._source.address + m.source * size, size, 0) for m in moves],
            [(self._target + m.destination * size, size, 0) for m in moves],
            wire.NOTICE.pack(self._batches),
            partial(self._go_on, deadline),
        )
        self._batches += 1
        while not self._stream.received:
            self._go_on(deadline, ANSWER_SECONDS)
            agent.notices()
        self._acknowledged(ticket, deadline)

    def _acknowledged(self, ticket: Ticket, deadline: float) -> None:
        failure = self._stream.read_ack(ticket, deadline)
        if failure is not None:
            raise failure

    def _go_on(self, deadline: float, seconds: float = 0.0) -> None:
        """Wait for an answer, which may be a little ahead of NIXL's news. Raises when no more can come."""
        if self._closing:
            raise PeerClosed("the channel is closed")
        if time.monotonic() >= deadline:
            raise DeadlineExceeded(self._stream.late)
        poller = select.poll()
        poller.register(self._stream.stream.socket, select.POLLIN)
        if poller.poll(seconds * 1e3):
            self._stream.receive()

    def _handshake(self, incarnation: str, endpoint: str, deadline: float) -> bytes:
        """The metadata of the receiver's agent."""
        address, token = split_endpoint(endpoint)
        self._stream.send([memoryview(wire.pack_hello(self._flags, self._block_bytes, token, incarnation))], deadline)
        head = self._stream.read(wire.WELCOME.size, deadline)
        magic, version, flags, block_bytes, self._target_blocks, self._target, length = wire.WELCOME.unpack(head)
        if magic == ELSEWHERE:
            raise PeerClosed(f"{self._peer.name} is not at {address}: another receiver answers there")
        if magic != wire.MAGIC or length > wire.MAX_METADATA:
            raise PeerClosed(f"{self._peer.name} is no receiver of ours")
        agree(
            ("nixl version", wire.VERSION, version),
            ("block_bytes", self._block_bytes, block_bytes),
            ("checksums", self._flags, flags),
        )
        metadata = self._stream.read(length, deadline)
        if not self._target_blocks:
            raise PeerClosed(f"{self._peer.name} has no pool")
        return metadata
