"""TCP between any two hosts: sent from the writer's pool without assembling, received straight into granted blocks.

One thread serves all writers of a receiver. A batch names its grant's key, generation, write token and blocks, which
are checked before a byte is placed. Since the same thread reads and revokes, a revoke is proof once it has run there:
the ticket is gone, and a connection that was in the middle of one of its blocks is closed.
"""

from __future__ import annotations

import logging
import socket
from functools import partial

from baton.errors import ConfigError
from baton.spec import HandoffKey, ProcessRef
from kvtransfer.handoff import Ticket
from kvtransfer.memory import PoolMemory
from kvtransfer.transports import tcp_wire as wire
from kvtransfer.transports.base import ReceiverEvents
from kvtransfer.transports.reactor import Reactor
from kvtransfer.transports.tcp_channel import TcpChannel
from kvtransfer.transports.tcp_connection import Broken, TcpConnection

log = logging.getLogger(__name__)

STALL_SECONDS = 60.0
KEEPALIVE_SECONDS = 30
MAX_CONNECTIONS = 1024
WILDCARDS = ("", "0.0.0.0", "::")


class TcpTransport:
    """Implements `Transport`. A receiver binds `host` and `port` (0: any) and tells writers `advertise`, or `host`.

    `checksums` (CRC-32 of each block) must be the same on both sides. A connection that stops in the middle of a
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
        checksums: bool = False,
        stall_s: float = STALL_SECONDS,
    ) -> None:
        self.memory = memory
        self.incarnation = incarnation
        self._events = events
        self._flags = wire.Flags.CHECKSUMS if checksums else wire.Flags(0)
        self._stall_s = stall_s
        self._tickets: dict[HandoffKey, Ticket] = {}  # single operations on it are atomic
        self._connections: dict[int, TcpConnection] = {}
        self._listener: socket.socket | None = None
        self._reactor: Reactor | None = None
        self._endpoint = ""
        if events is not None:
            self._listen(host, port, advertise)

    def endpoint(self) -> str:
        assert self._events is not None, "only a receiver has an endpoint"
        return self._endpoint

    def connect(self, endpoint: str, peer: ProcessRef, deadline: float) -> TcpChannel:
        return TcpChannel(self.memory, self._flags, endpoint, peer, deadline)

    def admit(self, ticket: Ticket) -> None:
        self._tickets[ticket.key] = ticket

    def revoke(self, key: HandoffKey) -> None:
        self._tickets.pop(key, None)
        if self._reactor is not None:
            self._reactor.call(partial(self._revoke, key))

    def close(self) -> None:
        if self._reactor is not None:
            self._reactor.close(self._close_all)

    def _listen(self, host: str, port: int, advertise: str | None) -> None:
        if host in WILDCARDS and not advertise:
            raise ConfigError(f"kv transfer binds {host or 'all addresses'}: say which address writers are to use")
        try:
            family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            self._listener = socket.create_server(address[:2], family=family, backlog=128)
        except OSError as error:
            raise ConfigError(f"kv transfer can't listen on {host}:{port}: {error}") from error
        self._listener.setblocking(False)
        shown = advertise or host
        shown = f"[{shown}]" if ":" in shown else shown
        self._endpoint = f"{shown}:{self._listener.getsockname()[1]}"
        self._reactor = Reactor("kv-tcp")
        self._reactor.listen(self._listener, self._accept)

    def _accept(self, peer: socket.socket) -> None:
        assert self._reactor is not None
        assert self._events is not None
        if len(self._connections) >= MAX_CONNECTIONS:
            log.warning("tcp: refused a writer: %d connections are open", len(self._connections))
            peer.close()
            return
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # finds half-open connections between batches
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_SECONDS)
        connection = TcpConnection(peer, self.memory, self._flags, self._events, self._tickets.get)
        fd = peer.fileno()
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
            self._reactor.limit(connection.socket.fileno(), None if connection.idle else self._stall_s)

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
        fd = connection.socket.fileno()
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
