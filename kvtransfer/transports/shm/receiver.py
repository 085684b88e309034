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
from collections.abc import Callable
from contextlib import suppress

from baton.errors import ConfigError
from baton.spec import HandoffKey
from kvtransfer.blocks.memory import PoolMemory
from kvtransfer.transports.base import ReceiverEvents
from kvtransfer.transports.receiver import Broken, SocketReceiver, WriterConnection
from kvtransfer.transports.shm import wire
from kvtransfer.transports.wire import Flags, Identity, Status, corrupt, intact, refusal, unpack_identity

SO_PEERPIDFD = 77  # Linux 6.5; not named by Python 3.11
HELLO_SECONDS = 10.0
OUT_OF_SIGHT = "its process is in a PID namespace that the receiver can't see into"
log = logging.getLogger(__name__)


class ShmConnection(WriterConnection):
    """`take` is called with each packet. Without an `incarnation` the writer has not introduced itself yet."""

    def __init__(self, peer: socket.socket, take: Callable[[ShmConnection, bytes], None]) -> None:
        """Raises `Broken` for a process of another user, or one that has ended already."""
        super().__init__(peer)
        self.incarnation = ""
        self._take = take
        self.pid: int
        self.pid, uid, _gid = struct.unpack("iII", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        if uid != os.getuid():
            raise Broken(f"process {self.pid} of user {uid}")
        self.pidfd = -1
        if self.out_of_sight:
            return
        try:
            self.pidfd, self._exact = _peer_pidfd(peer, self.pid)
        except OSError:
            raise Broken(f"process {self.pid} has ended") from None

    @property
    def idle(self) -> bool:
        return bool(self.incarnation)

    @property
    def out_of_sight(self) -> bool:
        """Whether the kernel has no number for the process here: its end could not be seen."""
        return self.pid <= 0

    def read(self) -> None:
        while (data := self.receive(wire.MAX_PACKET)) is not None:
            self._take(self, data)

    def started(self, at: int) -> bool:
        """Whether the pidfd is of the process that connected: a number may have been used again in between."""
        if self._exact:
            return True
        try:
            return wire.start_time(self.pid) == at
        except OSError:
            return False

    def send_memory(self, welcome: bytes, memfd: int) -> None:
        try:
            socket.send_fds(self.socket, [welcome], [memfd])
        except OSError as error:
            raise Broken(str(error)) from error

    def take_pidfd(self) -> int:
        """The caller owns it."""
        pidfd, self.pidfd = self.pidfd, -1
        return pidfd

    def close(self) -> None:
        super().close()
        if self.pidfd >= 0:
            os.close(self.take_pidfd())


class ShmReceiver(SocketReceiver[ShmConnection]):
    """`memory` must be shared. `checksums` (CRC-32 of each block) must be the same on both sides."""

    kind = "shm"
    revoke_proves = False

    def __init__(self, memory: PoolMemory, events: ReceiverEvents, checksums: bool = False) -> None:
        if memory.fd is None:
            raise ConfigError("the shm transport needs a pool in shared memory")
        self._memory = memory
        self._flags = Flags.CHECKSUMS if checksums else Flags(0)
        self._writers: dict[str, tuple[int, int]] = {}  # incarnation -> (pid, pidfd)
        name = f"baton-kv-{secrets.token_hex(12)}"
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        listener.bind("\0" + name)
        listener.listen(128)
        super().__init__(events, listener, f"@{name}", HELLO_SECONDS)

    def revoke(self, key: HandoffKey) -> None:
        self._tickets.pop(key, None)

    def _connection(self, peer: socket.socket) -> ShmConnection:
        return ShmConnection(peer, self._take)

    def _take(self, connection: ShmConnection, packet: bytes) -> None:
        (self._request if connection.incarnation else self._hello)(connection, packet)

    def _hello(self, connection: ShmConnection, packet: bytes) -> None:
        """Gives the memory to a writer that may have it."""
        if connection.out_of_sight:
            log.warning("shm: refused a writer: %s", OUT_OF_SIGHT)
            connection.send(wire.SORRY + OUT_OF_SIGHT.encode())
            raise Broken(OUT_OF_SIGHT)
        if len(packet) <= wire.HELLO.size or self._memory.fd is None:
            raise Broken("not a writer of ours")
        magic, version, flags, block_bytes, started = wire.HELLO.unpack_from(packet)
        if magic != wire.MAGIC or not connection.started(started):
            raise Broken("not a writer of ours")
        mine = self._memory.layout.block_bytes
        welcome = wire.WELCOME.pack(wire.MAGIC, wire.VERSION, self._flags, mine, self._memory.blocks)
        if (version, flags, block_bytes) != (wire.VERSION, self._flags, mine):
            connection.send(welcome)  # it sees the difference, and gets no memory
            raise Broken("the handshake differs")
        incarnation = packet[wire.HELLO.size :].decode(errors="replace")
        self._watch_writer(connection, incarnation)
        connection.incarnation = incarnation
        connection.send_memory(welcome, self._memory.fd)

    def _watch_writer(self, connection: ShmConnection, incarnation: str) -> None:
        """One pidfd for each incarnation, until its process ends."""
        known = self._writers.get(incarnation)
        if known is None:
            pidfd = connection.take_pidfd()
            self._writers[incarnation] = (connection.pid, pidfd)
            self._reactor.watch(pidfd, lambda _events: self._writer_exited(incarnation))
        elif known[0] != connection.pid:
            raise Broken(f"another process is {incarnation}")
        else:
            os.close(connection.take_pidfd())

    def _writer_exited(self, incarnation: str) -> None:
        for connection in [c for c in self._connections.values() if c.incarnation == incarnation]:
            with suppress(Broken):
                connection.read()  # the writes it had finished count
            self._drop(connection, "the writer's process has ended")
        self._forget_writer(incarnation)
        self._events.writer_gone(incarnation)

    def _forget_writer(self, incarnation: str) -> None:
        _pid, pidfd = self._writers.pop(incarnation)
        self._reactor.forget(pidfd)
        os.close(pidfd)

    def _request(self, connection: ShmConnection, packet: bytes) -> None:
        """Answers a CLAIM or a DONE."""
        if len(packet) < wire.HEAD_BYTES:
            raise Broken("a short request")
        op, body = packet[0], packet[wire.HEAD_BYTES :]
        identity = unpack_identity(packet, wire.OP.size)
        status, why, indices = self._judge(connection, op, identity, body)
        if status is not Status.OK:
            self._events.refused_write(identity.key, why)
        elif indices:
            self._events.landed(identity.key, identity.generation, indices)
        connection.send(bytes((status,)) + why.encode())

    def _judge(
        self, connection: ShmConnection, op: int, identity: Identity, body: bytes
    ) -> tuple[Status, str, list[int]]:
        """The status, the reason of a refusal, and the indices of the blocks that are in place."""
        ticket = self._tickets.get(identity.key)
        why = refusal(ticket, identity, (), connection.incarnation)
        if ticket is None or why is not None:
            return Status.REFUSED, why or "", []
        if op == wire.ShmOp.CLAIM:
            same = body == wire.table_digest(ticket)
            return (Status.OK, "", []) if same else (Status.REFUSED, "other blocks", [])
        if op != wire.ShmOp.DONE:
            raise Broken(f"request {op}")
        if len(body) % wire.ENTRY.size:
            return Status.REFUSED, "malformed entries", []
        entries = list(wire.ENTRY.iter_unpack(body))
        for index, _ in entries:
            if ticket.destination(index) is None:
                return Status.REFUSED, f"block {index} is not granted", []
        for index, checksum in entries:
            if not intact(self._memory, ticket.blocks[index], checksum, self._flags):
                return Status.CHECKSUM, corrupt(index), []
        return Status.OK, "", [index for index, _ in entries]

    def _close_all(self) -> None:
        super()._close_all()
        for incarnation in list(self._writers):
            self._forget_writer(incarnation)


def _peer_pidfd(peer: socket.socket, pid: int) -> tuple[int, bool]:
    """A pidfd of the process that connected, and whether it is surely that one. Raises `OSError` when it is gone."""
    try:
        return peer.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD), True
    except OSError:
        return os.pidfd_open(pid), False
