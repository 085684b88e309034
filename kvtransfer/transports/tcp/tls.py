"""TLS under a TCP connection: mutual, and within one authority of your own.

A process that has a certificate of it belongs to the cluster. Names in certificates are not compared, since workers
move between addresses.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass

from baton.errors import ConfigError
from kvtransfer.transports.sockets import Stream
from kvtransfer.transports.wire import Flags

CLIENT_HELLO = b"\x16\x03"
"""How a client that wants TLS starts; nothing else of ours does."""


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


def tcp_flags(checksums: bool, tls: TlsContexts | None) -> Flags:
    return (Flags.CHECKSUMS if checksums else Flags(0)) | (Flags(0) if tls is None else Flags.TLS)


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
