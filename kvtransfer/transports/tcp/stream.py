"""A TCP connection's bytes, plain or under TLS, behind the same three calls. None of them waits.

TLS is mutual and within one authority of your own: whoever has a certificate of it belongs to the cluster. Names in
certificates are not compared, since workers move between addresses.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from baton.errors import ConfigError

CALL_BYTES = 2**20
"""One call's worth: Python prepares each vector anew for each call, and a socket takes or gives less than this."""
CLIENT_HELLO = b"\x16\x03"
"""How a client that wants TLS starts; nothing else of ours does."""


class Stream:
    """Plain. Owns the socket, which must not block."""

    def __init__(self, connected: socket.socket) -> None:
        self.socket = connected

    @property
    def pending(self) -> bool:
        """Whether more can be received without the socket becoming ready."""
        return False

    def receive_into(self, vectors: list[memoryview]) -> int:
        """Fills what it can; 0 at the end. Raises `BlockingIOError` when nothing is there, `OSError`."""
        return self.socket.recvmsg_into(_some(vectors))[0]

    def send(self, vectors: list[memoryview]) -> int:
        """Sends what it can, without assembling. Raises `BlockingIOError` when nothing can leave, `OSError`."""
        return self.socket.sendmsg(_some(vectors))

    def shutdown(self) -> None:
        """Ends both directions, from any thread; whoever waits on the socket wakes."""
        with suppress(OSError):
            # Not the method of SSLSocket: that drops the TLS state under the thread that uses it.
            socket.socket.shutdown(self.socket, socket.SHUT_RDWR)

    def drain(self) -> None:
        """Reads and drops what has come."""
        with suppress(OSError):
            while self.socket.recv(4096):
                pass

    def close(self) -> None:
        self.socket.close()


class TlsStream(Stream):
    """The handshake is a part of the first calls."""

    socket: ssl.SSLSocket

    @property
    def pending(self) -> bool:
        return self.socket.pending() > 0

    def receive_into(self, vectors: list[memoryview]) -> int:
        return _unless_early(lambda: self.socket.recv_into(vectors[0]))

    def send(self, vectors: list[memoryview]) -> int:
        return _unless_early(lambda: self.socket.send(vectors[0]))


def _some(vectors: list[memoryview]) -> list[memoryview]:
    """The first ones, with `CALL_BYTES` or a little more between them."""
    size = 0
    for position, vector in enumerate(vectors):
        size += len(vector)
        if size >= CALL_BYTES:
            return vectors[: position + 1]
    return vectors


def _unless_early(call: Callable[[], int]) -> int:
    try:
        return call()
    except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
        raise BlockingIOError from None
    except ssl.SSLZeroReturnError:
        return 0


@dataclass(frozen=True, slots=True)
class TlsContexts:
    """For both directions, from one certificate."""

    server: ssl.SSLContext
    client: ssl.SSLContext

    @classmethod
    def load(cls, cert: str, key: str, ca: str) -> TlsContexts:
        """PEM files. Raises `ConfigError` that names the setting."""
        return cls(
            *(_context(protocol, cert, key, ca) for protocol in (ssl.PROTOCOL_TLS_SERVER, ssl.PROTOCOL_TLS_CLIENT))
        )

    def accept(self, connected: socket.socket) -> TlsStream:
        return TlsStream(self.server.wrap_socket(connected, server_side=True, do_handshake_on_connect=False))

    def connect(self, connected: socket.socket) -> TlsStream:
        return TlsStream(self.client.wrap_socket(connected, do_handshake_on_connect=False))


def _context(protocol: int, cert: str, key: str, ca: str) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    try:
        context.load_verify_locations(ca)
    except OSError as error:  # an ssl.SSLError is one
        raise ConfigError(f"tcp_tls_ca: can't use {ca}: {error}") from None
    try:
        context.load_cert_chain(cert, key, password="")  # never asked for at a terminal
    except OSError as error:
        raise ConfigError(f"tcp_tls_cert, tcp_tls_key: can't use {cert} with {key}: {error}") from None
    return context
