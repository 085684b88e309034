"""NIXL, the library of RDMA clusters, between any two hosts: written by the sender's agent straight into the pool.

A writer's every batch is announced on a control connection and checked before it may start, so the receiver knows at
any time which handoff's bytes may be on their way. Each pair has an agent of its own on either side. A revoke in the
middle of a batch closes the receiver's agent: its memory is not registered any more, its connections are gone and
nobody asks it for progress, so nothing of that writer can be placed. That is the proof, as a closed socket is for tcp.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable
from functools import partial

from baton.errors import ConfigError
from baton.spec import HandoffKey, ProcessRef
from kvtransfer.blocks.memory import PoolMemory
from kvtransfer.handoffs.messages import Ticket
from kvtransfer.transports.base import ReceiverEvents
from kvtransfer.transports.nixl import wire
from kvtransfer.transports.nixl.agent import available, restrict
from kvtransfer.transports.nixl.channel import NixlChannel
from kvtransfer.transports.nixl.connection import NixlConnection, Phase
from kvtransfer.transports.reactor import Reactor
from kvtransfer.transports.sockets import listen_on, prepare
from kvtransfer.transports.tcp.connection import Broken

log = logging.getLogger(__name__)

STALL_SECONDS = 60.0
MAX_CONNECTIONS = 1024


class NixlTransport:
    """Implements `Transport`. A receiver's control connections come to `host`, any port; writers are told `advertise`,
    or `host`. `checksums` must be the same on both sides.

    Raises `ConfigError` where the package is missing, the address can't be bound, or the environment lets UCX do what
    could not be stopped. The pool must outlive the transport.
    """

    kind = "nixl"
    revoke_proves = True

    def __init__(
        self,
        memory: PoolMemory,
        incarnation: str,
        events: ReceiverEvents | None = None,
        host: str = "127.0.0.1",
        advertise: str | None = None,
        checksums: bool = False,
        stall_s: float = STALL_SECONDS,
    ) -> None:
        if not available():
            raise ConfigError("transport: nixl needs the package of that name: install baton[nixl]")
        restrict(os.environ)
        self.memory = memory
        self.incarnation = incarnation
        self._events = events
        self._flags = wire.Flags.CHECKSUMS if checksums else wire.Flags(0)
        self._stall_s = stall_s
        self._tickets: dict[HandoffKey, Ticket] = {}  # single operations on it are atomic
        self._connections: dict[int, NixlConnection] = {}
        self._reactor: Reactor | None = None
        if events is not None:
            self._listener, self._endpoint = listen_on(host, 0, advertise)
            self._reactor = Reactor("kv-nixl")
            self._reactor.listen(self._listener, self._accept)

    def endpoint(self) -> str:
        assert self._events is not None, "only a receiver has an endpoint"
        return self._endpoint

    def connect(self, endpoint: str, peer: ProcessRef, deadline: float) -> NixlChannel:
        return NixlChannel(self.memory, self.incarnation, self._flags, endpoint, peer, deadline)

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
            log.warning("nixl: refused a writer: %d connections are open", len(self._connections))
            peer.close()
            return
        prepare(peer)
        connection = NixlConnection(peer, self.memory, self._flags, self._events, self._tickets.get)
        fd = peer.fileno()
        self._connections[fd] = connection
        self._reactor.watch(fd, partial(self._readable, connection), partial(self._late, connection))
        self._reactor.limit(fd, self._stall_s)

    def _readable(self, connection: NixlConnection, _events: int) -> None:
        self._advance(connection, connection.read)

    def _progress(self, connection: NixlConnection) -> None:
        self._advance(connection, connection.progress)

    def _advance(self, connection: NixlConnection, step: Callable[[], None]) -> None:
        assert self._reactor is not None
        was = connection.phase
        try:
            step()
        except Broken as why:
            self._drop(connection, str(why))
            return
        if connection.phase is was is Phase.WRITING:
            return  # asked without a pause; its time goes on
        fd = connection.socket.fileno()
        writing = connection.phase is Phase.WRITING
        self._reactor.poll(fd, partial(self._progress, connection) if writing else None)
        self._reactor.limit(fd, None if connection.idle else self._stall_s)

    def _late(self, connection: NixlConnection) -> None:
        self._drop(connection, "the writer stopped in the middle of a batch")

    def _revoke(self, key: HandoffKey) -> None:
        assert self._events is not None
        for connection in list(self._connections.values()):
            if connection.writes(key):
                self._drop(connection, f"{key} was revoked in the middle of a write")
        self._events.revoked(key)

    def _drop(self, connection: NixlConnection, why: str) -> None:
        assert self._reactor is not None
        fd = connection.socket.fileno()
        if self._connections.pop(fd, None) is None:
            return
        log.debug("nixl: closed a connection: %s", why)
        self._reactor.forget(fd)
        connection.close()

    def _close_all(self) -> None:
        assert self._reactor is not None
        self._reactor.forget(self._listener.fileno())
        self._listener.close()
        for connection in list(self._connections.values()):
            self._drop(connection, "the receiver closes")
