"""TCP sockets as the network transports open them: bound, advertised, dialled, with a deadline on every wait."""

from __future__ import annotations

import socket
import time

from baton.errors import ConfigError, DeadlineExceeded, PeerClosed

KEEPALIVE_SECONDS = 30
STALL_SECONDS = 60.0
"""After which a writer that stopped in the middle of a message is dropped."""
BACKLOG = 128
WILDCARDS = ("", "0.0.0.0", "::")
LOCAL_SEND_BYTES = 512 * 1024
"""A writer's buffer where the receiver is on the same host: no distance has to be filled, and bytes under way lie in
memory. The fewer, the warmer they are when they are read: a third faster than with the kernel's own growth."""


def listen_on(host: str, port: int, advertise: str | None, advertise_port: int = 0) -> tuple[socket.socket, str]:
    """A non-blocking listener on `host` and `port` (0: any), and the endpoint that writers are told: `advertise` or
    `host`, and `advertise_port` or the port that was bound. Raises `ConfigError`."""
    if host in WILDCARDS and not advertise:
        raise ConfigError(f"kv transfer binds {host or 'all addresses'}: say which address writers are to use")
    try:
        family, _, _, _, address = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM)[0]
        listener = socket.create_server(address[:2], family=family, backlog=BACKLOG)
    except OSError as error:
        raise ConfigError(f"kv transfer can't listen on {host}:{port}: {error}") from error
    listener.setblocking(False)
    shown = advertise or host
    shown = f"[{shown}]" if ":" in shown else shown
    return listener, f"{shown}:{advertise_port or listener.getsockname()[1]}"


def connect_to(endpoint: str, name: str, deadline: float) -> socket.socket:
    """A connection to the receiver `name`, which does not block. Raises `PeerClosed` or `DeadlineExceeded`."""
    host, _, port = endpoint.rpartition(":")
    try:
        connected = socket.create_connection((host.strip("[]"), int(port)), timeout=left(deadline))
    except TimeoutError as error:
        raise DeadlineExceeded(f"{name} did not answer at {endpoint}") from error
    except OSError as error:
        raise PeerClosed(f"{name} at {endpoint}: {error}") from error
    connected.setblocking(False)
    prepare(connected)
    if connected.getsockname()[0] == connected.getpeername()[0]:
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, LOCAL_SEND_BYTES)
    return connected


def prepare(connected: socket.socket) -> None:
    """Small messages leave at once, and a half-open connection is found between batches."""
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_SECONDS)


def left(deadline: float, late: str = "the deadline has passed") -> float:
    """Seconds until then. Raises `DeadlineExceeded(late)` when there are none."""
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise DeadlineExceeded(late)
    return seconds
