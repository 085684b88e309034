"""The writer's side of shared memory: map the receiver's pool once, then copy blocks straight into place."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import socket
import struct
import time
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress

from baton.errors import ChecksumMismatch, DeadlineExceeded, Mismatch, PeerClosed, WriteRefused
from baton.spec import HandoffKey, ProcessRef
from kvtransfer.blocks.memory import SEALS, BlockCopy, PoolMemory, copy_runs
from kvtransfer.handoffs.messages import BlockMove, Ticket
from kvtransfer.transports.base import Writer
from kvtransfer.transports.channel import BlockChannel
from kvtransfer.transports.shm import wire
from kvtransfer.transports.wire import Flags, Status, agree, checksum, pack_identity, refused

CLAIMS_REMEMBERED = 256
CALL_BYTES = 32 * 2**20


class ShmWriter(Writer):
    """`memory` may be of any kind. `checksums` must be the same on both sides."""

    kind = "shm"

    def __init__(
        self, memory: PoolMemory, incarnation: str, copy_blocks: BlockCopy = copy_runs, checksums: bool = False
    ) -> None:
        self.memory = memory
        self.incarnation = incarnation
        self.copy_blocks = copy_blocks
        self.flags = Flags.CHECKSUMS if checksums else Flags(0)

    def connect(self, endpoint: str, peer: ProcessRef, deadline: float) -> ShmChannel:
        return ShmChannel(self, endpoint, peer, deadline)


class ShmChannel(BlockChannel):
    def __init__(self, writer: ShmWriter, endpoint: str, peer: ProcessRef, deadline: float) -> None:
        super().__init__(writer.memory, peer)
        self._source = writer.memory
        self._flags = writer.flags
        self._copy_blocks = writer.copy_blocks
        self._pin = self._source.block(0)  # keeps the mapping while a copy reads it
        self._claimed: OrderedDict[HandoffKey, Ticket] = OrderedDict()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._map: mmap.mmap | None = None
        try:
            self._handshake(writer.incarnation, endpoint, deadline)
        except BaseException:
            self.close()
            raise

    def _move(self, ticket: Ticket, moves: Sequence[BlockMove], deadline: float) -> None:
        if self._claimed.get(ticket.key) != ticket:
            self._request(wire.ShmOp.CLAIM, ticket, wire.table_digest(ticket), deadline)
            self._claimed[ticket.key] = ticket
            if len(self._claimed) > CLAIMS_REMEMBERED:
                self._claimed.popitem(last=False)
        self._copy(moves, deadline)
        entries = [wire.ENTRY.pack(move.index, checksum(self._source, move.source, self._flags)) for move in moves]
        for first in range(0, len(entries), wire.MAX_ENTRIES):
            self._request(wire.ShmOp.DONE, ticket, b"".join(entries[first : first + wire.MAX_ENTRIES]), deadline)

    def _interrupt(self) -> None:
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def _free(self) -> None:
        self._socket.close()
        self._pin.release()
        if self._map is not None:
            self._map.close()
            self._map = None

    def _handshake(self, incarnation: str, endpoint: str, deadline: float) -> None:
        try:
            self._set_timeout(deadline)
            self._socket.connect("\0" + endpoint.removeprefix("@"))
            uid = struct.unpack("iII", self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[1]
            if uid != os.getuid():
                raise PeerClosed(f"{self._peer.name} at {endpoint} belongs to another user")
            started = wire.start_time(os.getpid())
            hello = wire.HELLO.pack(wire.MAGIC, wire.VERSION, self._flags, self._block_bytes, started)
            self._socket.send(hello + incarnation.encode())
            data, fds, _flags, _address = socket.recv_fds(self._socket, wire.MAX_PACKET, 1)
        except TimeoutError as error:
            raise DeadlineExceeded(f"{self._peer.name} did not answer at {endpoint}") from error
        except OSError as error:
            raise PeerClosed(f"{self._peer.name} at {endpoint}: {error}") from error
        try:
            self._map_pool(data, fds)
        finally:
            for fd in fds:
                os.close(fd)

    def _map_pool(self, welcome: bytes, fds: list[int]) -> None:
        if welcome.startswith(wire.SORRY):
            why = welcome.removeprefix(wire.SORRY).decode(errors="replace")
            raise PeerClosed(f"{self._peer.name} refused the connection: {why}")
        if len(welcome) != wire.WELCOME.size:
            raise PeerClosed(f"{self._peer.name} refused the connection")
        _magic, version, flags, block_bytes, blocks = wire.WELCOME.unpack(welcome)
        agree(
            ("shm version", wire.VERSION, version),
            ("block_bytes", self._block_bytes, block_bytes),
            ("checksums", self._flags, flags),
        )
        if not fds or fcntl.fcntl(fds[0], fcntl.F_GET_SEALS) & SEALS != SEALS:
            raise PeerClosed(f"{self._peer.name} passed no sealed memory")
        size = blocks * block_bytes
        if os.fstat(fds[0]).st_size != size:
            raise Mismatch("pool bytes", str(size), str(os.fstat(fds[0]).st_size))
        try:
            self._map = mmap.mmap(fds[0], size, mmap.MAP_SHARED | mmap.MAP_POPULATE)
        except OSError as error:
            raise PeerClosed(f"can't map the pool of {self._peer.name}: {error}") from error
        self._map.madvise(mmap.MADV_DONTFORK)  # a child must not outlive us as a writer
        self._target = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self._target_blocks = blocks

    def _copy(self, moves: Sequence[BlockMove], deadline: float) -> None:
        """A few calls, each short enough that a deadline or a close is noticed within milliseconds."""
        longest = max(1, CALL_BYTES // self._block_bytes)
        for first in range(0, len(moves), longest):
            if self._closing:
                raise PeerClosed("the channel is closed")
            if time.monotonic() >= deadline:
                raise DeadlineExceeded(f"the write to {self._peer.name} did not end in time")
            some = moves[first : first + longest]
            targets = [move.destination for move in some]
            outside = next((block for block in targets if not 0 <= block < self._target_blocks), None)
            if outside is not None:
                raise WriteRefused(f"block {outside} of {self._target_blocks}")
            sources = [move.source for move in some]
            self._copy_blocks(self._target, self._source.address, targets, sources, self._block_bytes)

    def _request(self, op: wire.ShmOp, ticket: Ticket, body: bytes, deadline: float) -> None:
        if self._closing:
            raise PeerClosed("the channel is closed")
        try:
            self._set_timeout(deadline)
            self._socket.send(wire.OP.pack(op) + pack_identity(ticket) + body)
            reply = self._socket.recv(wire.MAX_PACKET)
        except TimeoutError as error:
            raise DeadlineExceeded(f"{self._peer.name} did not answer in time") from error
        except OSError as error:
            raise PeerClosed(f"{self._peer.name}: {error}") from error
        if not reply:
            raise PeerClosed(f"{self._peer.name} closed the connection")
        why = reply[1:].decode(errors="replace")
        if reply[0] == Status.CHECKSUM:
            raise ChecksumMismatch(f"{ticket.key}: {why}")
        if reply[0] != Status.OK:
            self._claimed.pop(ticket.key, None)
            raise refused(ticket.key, why)

    def _set_timeout(self, deadline: float) -> None:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._socket.settimeout(left)
