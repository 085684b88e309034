"""TCP between any two hosts: sent from the writer's pool without assembling, received straight into granted blocks.

One thread serves all writers of a receiver. A batch names its grant's key, generation, write token and blocks, which
are checked before a byte is placed. Since the same thread reads and revokes, a revoke is proof once it has run there:
the ticket is gone, and a connection that was in the middle of one of its blocks is closed.
"""

from __future__ import annotations

import logging
import socket
from functools import partial

from baton.spec import HandoffKey, ProcessRef
from kvtransfer.blocks.memory import PoolMemory
from kvtransfer.handoffs.messages import Ticket
from kvtransfer.transports.base import Channel, ReceiverEvents
from kvtransfer.transports.reactor import Reactor
from kvtransfer.transports.sockets import listen_on, prepare
from kvtransfer.transports.tcp import wire
from kvtransfer.transports.tcp.channel import TcpChannel
from kvtransfer.transports.tcp.connection import Broken, TcpConnection
from kvtransfer.transports.tcp.parallel import ParallelChannel
from kvtransfer.transports.tcp.stream import TlsContexts

log = logging.getLogger(__name__)

STALL_SECONDS = 60.0
MAX_CONNECTIONS = 1024


class TcpTransport:
    """Implements `Transport`. A receiver binds `host` and `port` (0: any) and tells writers `advertise` or `host`, and
    `advertise_port` or the port that it has.

    `checksums` (CRC-32 of each block) and whether there is `tls` must be the same on both sides. A writer opens
    `connections` to each receiver. A connection that stops in the middle of a
    message is closed after `stall_s`. Raises `ConfigError` where the address can't be bound. The pool must outlive
    the transport.
    """

    kind = "tcp"
    revoke_proves = True

    def __init__(
        self,
        memory: PoolMemory,
        incarnation: str,
        events: ReceiverEvents | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
        advertise: str | None = None,
        advertise_port: int = 0,
        checksums: bool = False,
        tls: TlsContexts | None = None,
        connections: int = 1,
        stall_s: float = STALL_SECONDS,
    ) -> None:
        self.memory = memory
        self.incarnation = incarnation
        self._events = events
        self._flags = wire.Flags.CHECKSUMS if checksums else wire.Flags(0)
        self._tls = tls
        if tls is not None:
            self._flags |= wire.Flags.TLS
        self._count = connections
        self._stall_s = stall_s
        self._tickets: dict[HandoffKey, Ticket] = {}  # single operations on it are atomic
        self._connections: dict[int, TcpConnection] = {}
        self._listener: socket.socket | None = None
        self._reactor: Reactor | None = None
        self._endpoint = ""
        if events is not None:
            self._listener, self._endpoint = listen_on(host, port, advertise, advertise_port)
            self._reactor = Reactor("kv-tcp")
            self._reactor.listen(self._listener, self._accept)

    def endpoint(self) -> str:
        assert self._events is not None, "only a receiver has an endpoint"
        return self._endpoint

    def connect(self, endpoint: str, peer: ProcessRef, deadline: float) -> Channel:
        channels: list[Channel] = []
        try:
            for _ in range(self._count):
                channels.append(TcpChannel(self.memory, self._flags, endpoint, peer, deadline, self._tls))  # noqa: PERF401
        except BaseException:
            for channel in channels:
                channel.close()
            raise
        return channels[0] if len(channels) == 1 else ParallelChannel(channels)

    def admit(self, ticket: Ticket) -> None:
        self._tickets[ticket.key] = ticket

    def revoke(self, key: HandoffKey) -> None:
        self._tickets.pop(key, None)
        if self._reactor is not None:
            self._reactor.call(partial(self._revoke, key))

    def close(self) -> None:
        if self._reactor is not None:
            self._reactor.close(self._close_all)

    def _accept(self, peer: socket.socket) -> None:
        assert self._reactor is not None
        assert self._events is not None
        if len(self._connections) >= MAX_CONNECTIONS:
            log.warning("tcp: refused a writer: %d connections are open", len(self._connections))
            peer.close()
            return
        prepare(peer)
        fd = peer.fileno()
        connection = TcpConnection(peer, self._tls, self.memory, self._flags, self._events, self._tickets.get)
        self._connections[fd] = connection
        self._reactor.watch(fd, partial(self._readable, connection), partial(self._late, connection))
        self._reactor.limit(fd, self._stall_s)

    def _readable(self, connection: TcpConnection, _events: int) -> None:
        assert self._reactor is not None
        try:
            connection.read()
        except Broken as why:
            self._drop(connection, str(why))
        else:
            self._reactor.limit(connection.stream.socket.fileno(), None if connection.idle else self._stall_s)

    def _late(self, connection: TcpConnection) -> None:
        self._drop(connection, "the writer stopped in the middle of a message")

    def _revoke(self, key: HandoffKey) -> None:
        assert self._events is not None
        for connection in list(self._connections.values()):
            if connection.writes(key):
                self._drop(connection, f"{key} was revoked in the middle of a write")
        self._events.revoked(key)

    def _drop(self, connection: TcpConnection, why: str) -> None:
        assert self._reactor is not None
        fd = connection.stream.socket.fileno()
        if self._connections.pop(fd, None) is None:
            return
        log.debug("tcp: closed a connection: %s", why)
        self._reactor.forget(fd)
        connection.close()

    def _close_all(self) -> None:
        assert self._reactor is not None
        assert self._listener is not None
        self._reactor.forget(self._listener.fileno())
        self._listener.close()
        for connection in list(self._connections.values()):
            self._drop(connection, "the receiver closes")
