"""The common part of all receivers over sockets: accept a writer, read it, bound its silence, drop it.

One thread, the reactor's, serves all writers of a receiver and carries out its revokes.
"""

from __future__ import annotations

import logging
import socket
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import ClassVar, Generic, TypeVar

from baton.spec import HandoffKey
from kvtransfer.handoffs.messages import Ticket
from kvtransfer.transports.base import ReceiverEvents
from kvtransfer.transports.reactor import Reactor
from kvtransfer.transports.sockets import Stream, prepare

MAX_CONNECTIONS = 1024
log = logging.getLogger(__name__)


class Broken(Exception):
    """The writer left, or does not speak the protocol: the connection is to be closed."""


class WriterConnection(ABC):
    """One writer's connection, on the receiver. Belongs to the reactor's thread."""

    def __init__(self, peer: socket.socket) -> None:
        self.stream = Stream(peer)

    @property
    def socket(self) -> socket.socket:
        return self.stream.socket

    @property
    @abstractmethod
    def idle(self) -> bool:
        """Between two messages: the writer owes nothing."""

    @abstractmethod
    def read(self) -> None:
        """Takes all that has arrived. Raises `Broken`."""

    def writes(self, key: HandoffKey) -> bool:
        """Whether bytes of this handoff may be on their way."""
        return False

    def stop(self) -> None:
        """After this nothing of the write under way can be placed. Raises `Broken` where only a close stops it."""
        raise Broken("a handoff was revoked in the middle of a write")

    def receive(self, size: int) -> bytes | None:
        """Up to `size` bytes that have arrived; None while there are none. Raises `Broken`, also at the end."""
        try:
            data = self.socket.recv(size)
        except BlockingIOError:
            return None
        except OSError as error:
            raise Broken(str(error)) from error
        if not data:
            raise Broken("the writer closed the connection")
        return data

    def send(self, data: bytes) -> None:
        """Answers are small, and a writer reads them: one that lets them pile up is `Broken`."""
        try:
            sent = self.stream.send([memoryview(data)])
        except OSError as error:
            raise Broken(str(error)) from error
        if sent != len(data):
            raise Broken("the writer does not read its answers")

    def close(self) -> None:
        """After this nothing of the writer can be placed through this connection."""
        self.stream.close()


C = TypeVar("C", bound=WriterConnection)


class SocketReceiver(ABC, Generic[C]):
    """Implements `Receiver`. A connection that stops in the middle of a message is closed after `stall_s`.

    Writers may come before the constructor returns: a subclass calls it last.
    """

    kind: ClassVar[str]
    revoke_proves = True

    def __init__(self, events: ReceiverEvents, listener: socket.socket, endpoint: str, stall_s: float) -> None:
        self._events = events
        self._listener = listener
        self._endpoint = endpoint
        self._stall_s = stall_s
        self._tickets: dict[HandoffKey, Ticket] = {}  # single operations on it are atomic
        self._connections: dict[int, C] = {}
        self._reactor = Reactor(f"kv-{self.kind}")
        self._reactor.listen(listener, self._accept)

    def endpoint(self) -> str:
        return self._endpoint

    def admit(self, ticket: Ticket) -> None:
        self._tickets[ticket.key] = ticket

    def revoke(self, key: HandoffKey) -> None:
        self._tickets.pop(key, None)
        self._reactor.call(partial(self._revoke, key))

    def close(self) -> None:
        self._reactor.close(self._close_all)

    # -- on the reactor's thread ---------------------------------------------------------------------------------

    @abstractmethod
    def _connection(self, peer: socket.socket) -> C:
        """Raises `Broken` for a writer that is not welcome."""

    def _revoke(self, key: HandoffKey) -> None:
        for connection in list(self._connections.values()):
            if connection.writes(key):
                self._step(connection, connection.stop)
        self._events.revoked(key)

    def _accept(self, peer: socket.socket) -> None:
        try:
            if len(self._connections) >= MAX_CONNECTIONS:
                raise Broken(f"{MAX_CONNECTIONS} connections are open")
            if peer.family != socket.AF_UNIX:
                prepare(peer)
            connection = self._connection(peer)
        except Broken as why:
            log.warning("%s: refused a writer: %s", self.kind, why)
            peer.close()
            return
        fd = peer.fileno()
        self._connections[fd] = connection
        late = partial(self._drop, connection, "the writer stopped in the middle of a message")
        self._reactor.watch(fd, lambda _events: self._step(connection, connection.read), late)
        self._reactor.limit(fd, self._stall_s)

    def _step(self, connection: C, step: Callable[[], None]) -> None:
        """Runs a step of the connection, which may end it, and bounds the time for its writer's next message."""
        try:
            step()
        except Broken as why:
            self._drop(connection, str(why))
        else:
            self._bound(connection)

    def _bound(self, connection: C) -> None:
        self._reactor.limit(connection.socket.fileno(), None if connection.idle else self._stall_s)

    def _drop(self, connection: C, why: str) -> None:
        fd = connection.socket.fileno()
        if self._connections.pop(fd, None) is None:
            return
        log.debug("%s: closed a connection: %s", self.kind, why)
        self._reactor.forget(fd)
        connection.close()

    def _close_all(self) -> None:
        self._reactor.forget(self._listener.fileno())
        self._listener.close()
        for connection in list(self._connections.values()):
            self._drop(connection, "the receiver closes")
