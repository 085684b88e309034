"""The writer's side of shared memory: map the receiver's pool once, then copy blocks straight into place."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import socket
import struct
import threading
import time
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress

from baton.errors import ChecksumMismatch, DeadlineExceeded, Mismatch, PeerClosed, WriteRefused
from baton.spec import HandoffKey, ProcessRef
from kvtransfer.blocks.memory import SEALS, BlockCopy, PoolMemory
from kvtransfer.handoffs.messages import Ticket
from kvtransfer.transports.base import BlockMove, WriteReceipt
from kvtransfer.transports.check import plan
from kvtransfer.transports.shm import wire
from kvtransfer.transports.wire import pack_identity

CLAIMS_REMEMBERED = 256
CALL_BYTES = 32 * 2**20


class ShmChannel:
    """Implements `Channel`. Raises from the constructor as `Transport.connect` says."""

    def __init__(
        self,
        source: PoolMemory,
        incarnation: str,
        endpoint: str,
        peer: ProcessRef,
        deadline: float,
        copy_blocks: BlockCopy,
        flags: wire.Flags,
    ) -> None:
        self._source = source
        self._flags = flags
        self._copy_blocks = copy_blocks
        self._pin = source.block(0)  # keeps the mapping while a copy reads it
        self._peer = peer
        self._closing = False
        self._busy = threading.Lock()  # held while the mapping is in use
        self._claimed: OrderedDict[HandoffKey, Ticket] = OrderedDict()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._map: mmap.mmap | None = None
        try:
            self._handshake(incarnation, endpoint, deadline)
        except BaseException:
            self.close()
            raise

    def write(self, ticket: Ticket, moves: Sequence[BlockMove], deadline: float) -> WriteReceipt:
        started = time.monotonic()
        plan(ticket, moves, self._source.blocks)
        with self._busy:
            if self._claimed.get(ticket.key) != ticket:
                self._request(wire.Op.CLAIM, ticket, wire.table_digest(ticket), deadline)
                self._claimed[ticket.key] = ticket
                if len(self._claimed) > CLAIMS_REMEMBERED:
                    self._claimed.popitem(last=False)
            self._copy(moves, deadline)
            entries = [(move.index, self._checksum(move)) for move in moves]
            for first in range(0, len(entries), wire.MAX_ENTRIES):
                packed = wire.pack_entries(entries[first : first + wire.MAX_ENTRIES])
                self._request(wire.Op.DONE, ticket, packed, deadline)
        return WriteReceipt(len(moves) * self._source.layout.block_bytes, time.monotonic() - started)

    def close(self) -> None:
        self._closing = True
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes a write that waits for an answer
        with self._busy:  # a copy under way leaves the mapping at its next step
            self._socket.close()
            self._pin.release()
            if self._map is not None:
                self._map.close()
                self._map = None

    def _handshake(self, incarnation: str, endpoint: str, deadline: float) -> None:
        size = self._source.layout.block_bytes
        try:
            self._set_timeout(deadline)
            self._socket.connect("\0" + endpoint.removeprefix("@"))
            uid = struct.unpack("iII", self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[1]
            if uid != os.getuid():
                raise PeerClosed(f"{self._peer.name} at {endpoint} belongs to another user")
            started = wire.start_time(os.getpid())
            self._socket.send(
                wire.HELLO.pack(wire.MAGIC, wire.VERSION, self._flags, size, started) + incarnation.encode()
            )
            data, fds, _flags, _address = socket.recv_fds(self._socket, wire.MAX_PACKET, 1)
        except TimeoutError as error:
            raise DeadlineExceeded(f"{self._peer.name} did not answer at {endpoint}") from error
        except OSError as error:
            raise PeerClosed(f"{self._peer.name} at {endpoint}: {error}") from error
        try:
            self._map_pool(data, fds, size)
        finally:
            for fd in fds:
                os.close(fd)

    def _map_pool(self, welcome: bytes, fds: list[int], block_bytes: int) -> None:
        if len(welcome) != wire.WELCOME.size:
            raise PeerClosed(f"{self._peer.name} refused the connection")
        _magic, version, flags, theirs, blocks = wire.WELCOME.unpack(welcome)
        if version != wire.VERSION:
            raise Mismatch("shm version", str(wire.VERSION), str(version))
        if theirs != block_bytes:
            raise Mismatch("block_bytes", str(block_bytes), str(theirs))
        if flags != self._flags:
            raise Mismatch("checksums", str(self._flags), str(wire.Flags(flags)))
        if not fds or fcntl.fcntl(fds[0], fcntl.F_GET_SEALS) & SEALS != SEALS:
            raise PeerClosed(f"{self._peer.name} passed no sealed memory")
        if os.fstat(fds[0]).st_size != blocks * theirs:
            raise Mismatch("pool bytes", str(blocks * theirs), str(os.fstat(fds[0]).st_size))
        self._map = mmap.mmap(fds[0], blocks * theirs, mmap.MAP_SHARED | mmap.MAP_POPULATE)
        self._map.madvise(mmap.MADV_DONTFORK)  # a child must not outlive us as a writer
        self._target = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self._target_blocks = blocks

    def _copy(self, moves: Sequence[BlockMove], deadline: float) -> None:
        """A few calls, each short enough that a deadline or a close is noticed within milliseconds."""
        size = self._source.layout.block_bytes
        longest = max(1, CALL_BYTES // size)
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
            self._copy_blocks(self._target, self._source.address, targets, [move.source for move in some], size)

    def _checksum(self, move: BlockMove) -> int:
        return zlib.crc32(self._source.block(move.source)) if wire.Flags.CHECKSUMS in self._flags else 0

    def _request(self, op: wire.Op, ticket: Ticket, body: bytes, deadline: float) -> None:
        if self._closing:
            raise PeerClosed("the channel is closed")
        try:
            self._set_timeout(deadline)
            self._socket.send(wire.OP.pack(op) + pack_identity(ticket) + body)
            reply = self._socket.recv(wire.MAX_PACKET)
        except TimeoutError as error:
            self._closing = True  # a late answer would be taken for that of the next request
            raise DeadlineExceeded(f"{self._peer.name} did not answer in time") from error
        except OSError as error:
            raise PeerClosed(f"{self._peer.name}: {error}") from error
        if not reply:
            raise PeerClosed(f"{self._peer.name} closed the connection")
        if reply[0] == wire.Status.CHECKSUM:
            raise ChecksumMismatch(f"{ticket.key}: {reply[1:].decode(errors='replace')}")
        if reply[0] != wire.Status.OK:
            self._claimed.pop(ticket.key, None)
            raise WriteRefused(f"{ticket.key}: {reply[1:].decode(errors='replace')}")

    def _set_timeout(self, deadline: float) -> None:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._socket.settimeout(left)
