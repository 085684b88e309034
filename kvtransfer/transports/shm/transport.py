"""Shared memory: the receiver's pool is a memfd that a writer on the same host maps and copies into. One copy.

The receiver listens on an abstract unix socket with a random name, which leaves no file behind. Only processes of the
same user get the memfd. Each writer's process is watched through a pidfd: its exit is the proof that it writes no
more, since the mapping died with it. A writer that lives keeps its mapping, so a revoke alone proves nothing; its
Closed does.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from baton.errors import ConfigError
from baton.spec import HandoffKey, ProcessRef
from kvtransfer.blocks.memory import BlockCopy, PoolMemory, copy_runs
from kvtransfer.handoffs.messages import Ticket
from kvtransfer.transports.base import ReceiverEvents
from kvtransfer.transports.check import identity_refusal
from kvtransfer.transports.reactor import Reactor
from kvtransfer.transports.shm import wire
from kvtransfer.transports.shm.channel import ShmChannel
from kvtransfer.transports.wire import IDENTITY, Identity, unpack_identity

log = logging.getLogger(__name__)

SO_PEERPIDFD = 77  # Linux 6.5; not named by Python 3.11
HELLO_SECONDS = 10.0
MAX_CONNECTIONS = 1024


@dataclass(slots=True)
class _Connection:
    socket: socket.socket
    pid: int
    pidfd: int
    exact: bool  # the pidfd came with the connection; otherwise the process might be another with the same number
    incarnation: str = ""


class ShmTransport:
    """Implements `Transport`. `memory` must be shared on a receiver; a writer's pool may be of any kind. The pool must
    outlive the transport. `copy_blocks` is how the writer copies. `checksums` (CRC-32 of each
    block) must be the same on both sides."""

    kind = "shm"
    revoke_proves = False

    def __init__(
        self,
        memory: PoolMemory,
        incarnation: str,
        events: ReceiverEvents | None = None,
        copy_blocks: BlockCopy = copy_runs,
        checksums: bool = False,
    ) -> None:
        self.memory = memory
        self.incarnation = incarnation
        self._events = events
        self._copy_blocks = copy_blocks
        self._flags = wire.Flags.CHECKSUMS if checksums else wire.Flags(0)
        self._tickets: dict[HandoffKey, Ticket] = {}  # single operations on it are atomic
        self._connections: dict[int, _Connection] = {}
        self._writers: dict[str, tuple[int, int]] = {}  # incarnation -> (pid, pidfd)
        self._listener: socket.socket | None = None
        self._reactor: Reactor | None = None
        self._name = f"baton-kv-{secrets.token_hex(12)}"
        if events is not None:
            self._listen()

    def endpoint(self) -> str:
        assert self._events is not None, "only a receiver has an endpoint"
        return f"@{self._name}"

    def connect(self, endpoint: str, peer: ProcessRef, deadline: float) -> ShmChannel:
        return ShmChannel(self.memory, self.incarnation, endpoint, peer, deadline, self._copy_blocks, self._flags)

    def admit(self, ticket: Ticket) -> None:
        self._tickets[ticket.key] = ticket

    def revoke(self, key: HandoffKey) -> None:
        self._tickets.pop(key, None)

    def close(self) -> None:
        if self._reactor is not None:
            self._reactor.close(self._close_all)

    def _listen(self) -> None:
        if self.memory.fd is None:
            raise ConfigError("the shm transport needs a pool in shared memory")
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        self._listener.bind("\0" + self._name)
        self._listener.listen(128)
        self._reactor = Reactor("kv-shm")
        self._reactor.listen(self._listener, self._accept)

    def _accept(self, peer: socket.socket) -> None:
        assert self._reactor is not None
        pid, uid, _gid = struct.unpack("iII", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        if uid != os.getuid() or pid <= 0 or len(self._connections) >= MAX_CONNECTIONS:
            log.warning("shm: refused process %d of user %d", pid, uid)
            peer.close()
            return
        try:
            pidfd, exact = _peer_pidfd(peer, pid)
        except OSError:
            peer.close()  # it has ended already
            return
        connection = _Connection(peer, pid, pidfd, exact)
        fd = peer.fileno()
        self._connections[fd] = connection
        self._reactor.watch(fd, partial(self._readable, connection), partial(self._drop, connection))
        self._reactor.limit(fd, HELLO_SECONDS)

    def _readable(self, connection: _Connection, _events: int) -> None:
        self._ready(connection)

    def _ready(self, connection: _Connection) -> bool:
        """Serve one packet. False when there is none, or the connection has ended."""
        try:
            data = connection.socket.recv(wire.MAX_PACKET)
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        if not data or not (
            self._message(connection, data) if connection.incarnation else self._hello(connection, data)
        ):
            self._drop(connection)
            return False
        return True

    def _hello(self, connection: _Connection, data: bytes) -> bool:
        """Whether the writer may have the memory."""
        assert self._reactor is not None
        if len(data) <= wire.HELLO.size or self.memory.fd is None:
            return False
        magic, version, flags, block_bytes, started = wire.HELLO.unpack_from(data)
        if magic != wire.MAGIC or not _still(connection, started):
            return False
        mine = self.memory.layout.block_bytes
        welcome = wire.WELCOME.pack(wire.MAGIC, wire.VERSION, self._flags, mine, self.memory.blocks)
        if (version, flags, block_bytes) != (wire.VERSION, self._flags, mine):
            _send(connection.socket.send, welcome)  # it sees what differs, and gets no memory
            return False
        incarnation = data[wire.HELLO.size :].decode(errors="replace")
        if not self._watch_writer(connection, incarnation):
            return False
        connection.incarnation = incarnation
        self._reactor.limit(connection.socket.fileno(), None)
        return _send(partial(socket.send_fds, connection.socket, [welcome], [self.memory.fd]))

    def _watch_writer(self, connection: _Connection, incarnation: str) -> bool:
        """One pidfd for each incarnation, until its process ends. False when another process claims the same."""
        assert self._reactor is not None
        known = self._writers.get(incarnation)
        if known is not None:
            os.close(connection.pidfd)
            connection.pidfd = -1
            return known[0] == connection.pid
        self._writers[incarnation] = (connection.pid, connection.pidfd)
        self._reactor.watch(connection.pidfd, lambda _events: self._writer_exited(incarnation))
        connection.pidfd = -1
        return True

    def _writer_exited(self, incarnation: str) -> None:
        assert self._reactor is not None
        assert self._events is not None
        for connection in [c for c in self._connections.values() if c.incarnation == incarnation]:
            while self._ready(connection):
                pass  # what it had finished counts
            self._drop(connection)
        pidfd = self._writers.pop(incarnation)[1]
        self._reactor.forget(pidfd)
        os.close(pidfd)
        self._events.writer_gone(incarnation)

    def _message(self, connection: _Connection, data: bytes) -> bool:
        """Answer a CLAIM or a DONE; False for anything else, which ends the connection."""
        assert self._events is not None
        if len(data) < wire.OP.size + IDENTITY.size:
            return False
        identity = unpack_identity(data, wire.OP.size)
        ticket = self._tickets.get(identity.key)
        why = identity_refusal(ticket, identity.generation, identity.write_token)
        entries: list[tuple[int, int]] | None = []
        if why is None and ticket is not None:
            if ticket.writer != connection.incarnation:
                why = "the ticket belongs to another process"
            elif data[0] == wire.Op.CLAIM:
                why = None if data[wire.OP.size + IDENTITY.size :] == wire.table_digest(ticket) else "other blocks"
            elif data[0] == wire.Op.DONE:
                entries = wire.unpack_entries(data)
                why = _entries_refusal(ticket, entries)
            else:
                return False
        if why is None and ticket is not None:
            wrong = next((index for index, crc in entries or () if not self._intact(ticket, index, crc)), None)
            if wrong is not None:
                text = f"block {wrong} arrived with other bytes than were sent"
                return self._answer(connection, identity, wire.Status.CHECKSUM, text, [])
        status = wire.Status.OK if why is None else wire.Status.REFUSED
        return self._answer(connection, identity, status, why or "", [index for index, _ in entries or ()])

    def _intact(self, ticket: Ticket, index: int, checksum: int) -> bool:
        if wire.Flags.CHECKSUMS not in self._flags:
            return True
        return zlib.crc32(self.memory.block(ticket.blocks[index])) == checksum

    def _answer(
        self, connection: _Connection, identity: Identity, status: wire.Status, text: str, indices: list[int]
    ) -> bool:
        assert self._events is not None
        if status is not wire.Status.OK:
            self._events.refused_write(identity.key, text)
        elif indices:
            self._events.landed(identity.key, identity.generation, indices)
        return _send(connection.socket.send, bytes((status,)) + text.encode())

    def _drop(self, connection: _Connection) -> None:
        assert self._reactor is not None
        fd = connection.socket.fileno()
        if self._connections.pop(fd, None) is None:
            return
        self._reactor.forget(fd)
        connection.socket.close()
        if connection.pidfd >= 0:
            os.close(connection.pidfd)

    def _close_all(self) -> None:
        assert self._reactor is not None
        assert self._listener is not None
        self._reactor.forget(self._listener.fileno())
        self._listener.close()
        for connection in list(self._connections.values()):
            self._drop(connection)
        for _pid, pidfd in self._writers.values():
            self._reactor.forget(pidfd)
            os.close(pidfd)
        self._writers.clear()


def _entries_refusal(ticket: Ticket, entries: list[tuple[int, int]] | None) -> str | None:
    if entries is None:
        return "malformed entries"
    wrong = next((index for index, _ in entries if ticket.destination(index) is None), None)
    return None if wrong is None else f"block {wrong} is not granted"


def _send(send: Callable[..., object], *args: object) -> bool:
    """False when the peer does not take it: it has left, or does not read, which no correct writer does."""
    try:
        send(*args)
    except OSError:
        return False
    return True


def _peer_pidfd(peer: socket.socket, pid: int) -> tuple[int, bool]:
    """A pidfd of the process that connected, and whether it is surely that one. Raises `OSError` when it is gone."""
    try:
        return peer.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD), True
    except OSError:
        return os.pidfd_open(pid), False


def _still(connection: _Connection, started: int) -> bool:
    """Whether the pidfd is of the process that connected: a number may have been used again in between."""
    if connection.exact:
        return True
    try:
        return wire.start_time(connection.pid) == started
    except OSError:
        return False
