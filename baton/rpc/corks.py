"""What is written to one connection at one go leaves in few packets.

gRPC sends each message of each stream with a sendmsg(2) of its own, at once: a run through the network stack, a packet
and a waking of the receiver for some 40 bytes. A step of a decode worker brings a token for each of a client's streams.
While these are written the client's connection is corked (TCP_CORK, see tcp(7)): the kernel gathers what comes, and
sends it when the cork is pulled.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import stat
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from functools import partial
from pathlib import Path
from urllib.parse import unquote

import structlog

from baton.errors import ConfigError
from baton.rpc.net import parse_address

WIDE = 8
"""Streams on a connection from which on it is corked."""
BATCH = 16
"""Writes of a burst after which all corks are pulled: for so many, half a millisecond, the first one may wait."""
MAPPED = "::ffff:"
OWN = Path("/proc/self/fd")
log = structlog.get_logger(__name__)


class Connection:
    """A client's connection, while it has streams."""

    __slots__ = ("corked", "socket", "sought", "streams")

    def __init__(self) -> None:
        self.streams = 0
        self.sought = self.corked = False
        self.socket: socket.socket | None = None
        """A duplicate of gRPC's: so it is this connection for certain and never one that came after it."""

    def cork(self, corked: bool) -> None:
        """The kernel takes it of a broken connection too."""
        assert self.socket is not None, "it was found"
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, corked)
        self.corked = corked

    def close(self) -> None:
        """gRPC's own stays open, and never corked."""
        if self.socket is not None:
            if self.corked:
                self.cork(False)
            self.socket.close()
            self.socket = None


class Corks:
    """Entered around a burst of writes. Lives on one event loop.

    It knows a connection by its peer, and finds its socket among the process's own: gRPC does not tell. Where it is not
    found writes cost more, and the log says so.
    """

    def __init__(self, executor: Executor) -> None:
        """Sockets are looked for there: some microseconds for each that is open."""
        self._executor = executor
        self._connections: dict[str, Connection] = {}
        self._corked: list[Connection] = []
        self._within, self._writes = False, 0

    def __len__(self) -> int:
        """Connections that have streams."""
        return len(self._connections)

    @property
    def found(self) -> int:
        """Those whose sockets were sought and found."""
        return sum(connection.socket is not None for connection in self._connections.values())

    @contextlib.contextmanager
    def stream(self, peer: str) -> Iterator[Callable[[], None]]:
        """One more stream to `peer`, as gRPC writes it; what is yielded is to be called before each write to it."""
        connection = self._connections.get(peer)
        if connection is None:
            connection = self._connections[peer] = Connection()
        connection.streams += 1
        if connection.streams >= WIDE and not connection.sought and hasattr(socket, "TCP_CORK"):
            connection.sought = True
            seeking = asyncio.get_running_loop().run_in_executor(self._executor, find_socket, peer)
            seeking.add_done_callback(partial(self._found, peer, connection))
        try:
            yield partial(self._before_write, connection)
        finally:
            connection.streams -= 1
            if not connection.streams:
                del self._connections[peer]
                connection.close()

    def __enter__(self) -> None:
        self._within, self._writes = True, 0

    def __exit__(self, *_: object) -> None:
        self._within = False
        self._pull()

    def _before_write(self, connection: Connection) -> None:
        if not self._within or connection.socket is None or connection.streams < WIDE:
            return
        if self._writes == BATCH:
            self._pull()
            self._writes = 0
        self._writes += 1
        if not connection.corked:
            connection.cork(True)
            self._corked.append(connection)

    def _pull(self) -> None:
        for connection in self._corked:
            if connection.socket is not None:  # its last stream may have ended since
                connection.cork(False)
        self._corked.clear()

    def _found(self, peer: str, connection: Connection, seeking: asyncio.Future[socket.socket | None]) -> None:
        if seeking.cancelled():
            return
        found = seeking.result()
        if found is None:
            log.info("a client's socket was not found: its packets won't be gathered", peer=peer)
        elif connection.streams:
            connection.socket = found
        else:
            found.close()


def find_socket(peer: str) -> socket.socket | None:
    """A duplicate of this process's TCP socket that is connected to `peer`, a `grpc.ServicerContext.peer()`; None where
    there is none, as for a Unix socket."""
    scheme, _, where = peer.partition(":")
    if scheme not in ("ipv4", "ipv6"):
        return None
    with contextlib.suppress(ConfigError, OSError):
        wanted = parse_address(unquote(where))
        for name in OWN.iterdir():
            if (found := _duplicate(int(name.name))) is not None:
                if _peer_of(found) == wanted:
                    return found
                found.close()
    return None


def _duplicate(descriptor: int) -> socket.socket | None:
    """None unless it is a TCP socket."""
    try:
        if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
            return None
        copy = socket.socket(fileno=os.dup(descriptor))
    except OSError:  # closed meanwhile
        return None
    if copy.type == socket.SOCK_STREAM and copy.family in (socket.AF_INET, socket.AF_INET6):
        return copy
    copy.close()
    return None


def _peer_of(connected: socket.socket) -> tuple[str, int] | None:
    try:
        host, port = connected.getpeername()[:2]
    except OSError:  # it listens
        return None
    return host.removeprefix(MAPPED), port
