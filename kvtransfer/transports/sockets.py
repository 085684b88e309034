"""TCP sockets as the network transports open them, and a connection's bytes: non-blocking streams for both ends, and
the writer's end with a deadline on every wait."""

from __future__ import annotations

import secrets
import select
import socket
import time
from contextlib import suppress

from baton.errors import ChecksumMismatch, ConfigError, DeadlineExceeded, PeerClosed, TransferError
from kvtransfer.handoffs.messages import Ticket
from kvtransfer.transports import wire

KEEPALIVE_SECONDS = 30
STALL_SECONDS = 60.0
"""A writer that stops in the middle of a message for so long is dropped."""
BACKLOG = 128
WILDCARDS = ("", "0.0.0.0", "::")
LOCAL_SEND_BYTES = 512 * 1024
"""A writer's buffer where the receiver is on the same host. Fewer bytes under way are still in the cache when they are
read: a third faster than with the kernel's own growth."""
CALL_BYTES = 2**20
"""The most per call: Python prepares each vector anew for each call, and a socket moves less than this."""
READ_BYTES = 4096


def listen_on(host: str, port: int, advertise: str | None, advertise_port: int = 0) -> tuple[socket.socket, str]:
    """A non-blocking listener on `host` and `port` (0: any), and the endpoint that writers are told: `advertise` or
    `host`, `advertise_port` or the port that was bound, and a new token. A wildcard takes IPv4 and IPv6, as with gRPC.
    Raises `ConfigError`."""
    if host in WILDCARDS and not advertise:
        raise ConfigError(f"kv transfer binds {host or 'all addresses'}: say which address writers are to use")
    try:
        both = host in WILDCARDS and socket.has_dualstack_ipv6()
        bound = "::" if both else host or None
        family, _, _, _, address = socket.getaddrinfo(bound, port, type=socket.SOCK_STREAM)[0]
        listener = socket.create_server(address[:2], family=family, backlog=BACKLOG, dualstack_ipv6=both)
    except OSError as error:
        raise ConfigError(f"kv transfer can't listen on {host}:{port}: {error}") from error
    listener.setblocking(False)
    shown = advertise or host
    shown = f"[{shown}]" if ":" in shown else shown
    token = secrets.token_hex(wire.TOKEN_BYTES)
    return listener, f"{shown}:{advertise_port or listener.getsockname()[1]}#{token}"


def split_endpoint(endpoint: str) -> tuple[str, bytes]:
    """The address, and the token by which the receiver knows that it is meant: `HOST:PORT#TOKEN`. Zeros where there is
    none, as from a receiver of an older version. Raises `PeerClosed` for a malformed one."""
    address, _, token = endpoint.partition("#")
    try:
        raw = bytes.fromhex(token) or bytes(wire.TOKEN_BYTES)
    except ValueError:
        raw = b""
    if len(raw) != wire.TOKEN_BYTES:
        raise PeerClosed(f"{address}: a malformed token")
    return address, raw


def connect_to(endpoint: str, name: str, deadline: float) -> socket.socket:
    """A connection to the receiver `name`, which does not block. Raises `PeerClosed` or `DeadlineExceeded`."""
    address = split_endpoint(endpoint)[0]
    host, _, port = address.rpartition(":")
    try:
        connected = socket.create_connection((host.strip("[]"), int(port)), timeout=left(deadline))
    except TimeoutError as error:
        raise DeadlineExceeded(f"{name} did not answer at {address}") from error
    except (OSError, ValueError, OverflowError) as error:  # the last two: no host or port that could be one
        raise PeerClosed(f"{name} at {address}: {error}") from error
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
    """Seconds until the deadline. Raises `DeadlineExceeded(late)` after it."""
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise DeadlineExceeded(late)
    return seconds


class Stream:
    """Owns a socket that does not block; no call waits."""

    def __init__(self, connected: socket.socket) -> None:
        self.socket = connected

    @property
    def pending(self) -> bool:
        """Whether more can be received without the socket becoming ready."""
        return False

    def receive_into(self, vectors: list[memoryview]) -> int:
        """Bytes received; 0 at the end of the stream. Raises `BlockingIOError` when none are there, `OSError`."""
        return self.socket.recvmsg_into(_some(vectors))[0]

    def send(self, vectors: list[memoryview]) -> int:
        """Bytes sent, without assembling. Raises `BlockingIOError` when none can leave, `OSError`."""
        return self.socket.sendmsg(_some(vectors))

    def shut_down(self) -> None:
        """End both directions, from any thread; a wait on the socket ends."""
        with suppress(OSError):
            # Not the method of SSLSocket: that drops the TLS state under the thread that uses it.
            socket.socket.shutdown(self.socket, socket.SHUT_RDWR)

    def drain(self) -> None:
        """Drop all that has arrived."""
        with suppress(OSError):
            while self.socket.recv(READ_BYTES):
                pass

    def close(self) -> None:
        self.socket.close()


class WriterSocket:
    """The writer's end of a connection to the receiver `name`. One thread at a time uses it, but for `shut_down`.

    Each method that waits raises `DeadlineExceeded`, or `PeerClosed`: also after `shut_down`.
    """

    def __init__(self, stream: Stream, name: str) -> None:
        self.stream = stream
        self.name = name
        self.received = bytearray()
        """Bytes that have arrived and were not read yet."""
        self.late = f"the write to {name} did not end in time"
        self._shut = False

    def send(self, vectors: list[memoryview], deadline: float) -> None:
        while vectors:
            try:
                count = self.stream.send(vectors)
            except BlockingIOError:
                self.wait(deadline, select.POLLOUT)
            except OSError as error:
                raise PeerClosed(f"{self.name}: {error}") from error
            else:
                vectors = rest(vectors, count)

    def read(self, size: int, deadline: float) -> bytes:
        while len(self.received) < size:
            self.wait(deadline)
        data = bytes(self.received[:size])
        del self.received[:size]
        return data

    def read_ack(self, ticket: Ticket, deadline: float) -> TransferError | None:
        """Reads one batch's answer; returns its error, if it failed."""
        magic, status, length = wire.ACK.unpack(self.read(wire.ACK.size, deadline))
        if magic != wire.BATCH_MAGIC or length > wire.MAX_TEXT:
            raise PeerClosed(f"{self.name} sent no answer of ours")
        why = self.read(length, deadline).decode(errors="replace")
        if status == wire.Status.OK:
            return None
        if status == wire.Status.CHECKSUM:
            return ChecksumMismatch(f"{ticket.key}: {why}")
        return wire.refused(ticket.key, why)

    def wait(self, deadline: float, event: int = select.POLLIN, also: int | None = None) -> None:
        """Until the socket is ready for `event`, or the descriptor `also` for reading. Answers that
        arrive meanwhile are received, so that the receiver can always send one."""
        poller = select.poll()
        poller.register(self.stream.socket, event | select.POLLIN)
        if also is not None:
            poller.register(also, select.POLLIN)
        ready = dict(poller.poll(left(deadline, self.late) * 1000))
        if self._shut:
            raise PeerClosed("the channel is closed")
        if not ready:
            raise DeadlineExceeded(self.late)
        state = ready.get(self.stream.socket.fileno(), 0)
        if state & select.POLLIN or (state and event == select.POLLIN):
            self.receive()

    def receive(self) -> None:
        """Take all that has arrived, without waiting. Raises `PeerClosed` at the end of the stream."""
        incoming = bytearray(READ_BYTES)
        try:
            count = self.stream.receive_into([memoryview(incoming)])
        except BlockingIOError:
            return
        except OSError as error:
            raise PeerClosed(f"{self.name}: {error}") from error
        if not count:
            raise PeerClosed(f"{self.name} closed the connection")
        self.received += incoming[:count]

    def shut_down(self) -> None:
        """End a wait and the connection; from any thread, also after `close`."""
        self._shut = True
        self.stream.shut_down()

    def close(self) -> None:
        self.stream.close()


def rest(vectors: list[memoryview], count: int) -> list[memoryview]:
    """`vectors` without their first `count` bytes."""
    for position, vector in enumerate(vectors):
        if count < len(vector):
            return [vector[count:], *vectors[position + 1 :]]
        count -= len(vector)
    return []


def _some(vectors: list[memoryview]) -> list[memoryview]:
    """The first ones, with `CALL_BYTES` or a little more between them."""
    size = 0
    for position, vector in enumerate(vectors):
        size += len(vector)
        if size >= CALL_BYTES:
            return vectors[: position + 1]
    return vectors
