"""NCCL between pools in CUDA memory: device to device, without a copy through the host.

A pair of processes shares a communicator of two ranks, made when the first batch needs it. NCCL has no one-sided write,
no deadline, and does not notice a peer's death; so a batch is agreed over a control connection before either side posts
it, and every wait ends with an abort. Proof that a grant is written no more is that no receive of it is posted: none
ever was, the last one has completed, or its communicator's abort has returned and the stream is drained.
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable
from functools import partial

from baton.errors import ConfigError
from baton.spec import HandoffKey, ProcessRef
from kvtransfer.handoffs.messages import Ticket
from kvtransfer.transports.base import ReceiverEvents
from kvtransfer.transports.nccl.channel import Fence, NcclChannel
from kvtransfer.transports.nccl.connection import Broken, NcclConnection
from kvtransfer.transports.nccl.issuer import MAX_LINKS, Issuer, Link
from kvtransfer.transports.nccl.seam import RECEIVER, BlockMemory, Device, Span
from kvtransfer.transports.reactor import Reactor

log = logging.getLogger(__name__)

HELLO_SECONDS = 10.0
GRACE_SECONDS = 5.0  # past a batch's deadline, for a writer to say that it gives up
KEEPALIVE_SECONDS = 30
MAX_CONNECTIONS = 1024
STALL_SECONDS = 60.0
WILDCARDS = ("", "0.0.0.0", "::")


def no_fence() -> None:
    """Of a pool that is filled synchronously."""


class NcclTransport:
    """Implements `Transport`. `memory` is on `device`, and outlives the transport.

    A receiver's control port is any free one of `host`; writers are told `advertise`, or `host`. `fence` is called on
    the thread that calls `write`: it gives what the engine has recorded after the work that fills the newest blocks,
    and the sends wait for it on the device. At most `max_links` communicators live at once; the least recently used
    idle one makes room. Raises `ConfigError` where the address can't be bound.
    """

    kind = "nccl"
    revoke_proves = True

    def __init__(
        self,
        memory: BlockMemory,
        incarnation: str,
        device: Device,
        events: ReceiverEvents | None = None,
        host: str = "127.0.0.1",
        advertise: str | None = None,
        fence: Fence = no_fence,
        max_links: int = MAX_LINKS,
    ) -> None:
        self.memory = memory
        self.incarnation = incarnation
        self._events = events
        self._fence = fence
        self._tickets: dict[HandoffKey, Ticket] = {}  # single operations on it are atomic
        self._connections: dict[int, NcclConnection] = {}
        self._writing: dict[HandoffKey, dict[Link, int]] = {}  # receives that are posted: the group on that link
        self._revoking: list[HandoffKey] = []  # waiting for proof
        self._listener: socket.socket | None = None
        self._reactor: Reactor | None = None
        self._endpoint = ""
        if events is not None:
            self._listen(host, advertise)
        self._issuer = Issuer(device, max_links)

    def endpoint(self) -> str:
        assert self._events is not None, "only a receiver has an endpoint"
        return self._endpoint

    def connect(self, endpoint: str, peer: ProcessRef, deadline: float) -> NcclChannel:
        return NcclChannel(self.memory, self._issuer, self.incarnation, endpoint, peer, deadline, self._fence)

    def admit(self, ticket: Ticket) -> None:
        self._tickets[ticket.key] = ticket

    def revoke(self, key: HandoffKey) -> None:
        self._tickets.pop(key, None)
        if self._reactor is not None:
            self._reactor.call(partial(self._revoke, key))

    def close(self) -> None:
        if self._reactor is not None:
            self._reactor.close(self._close_all)
        self._issuer.close()

    # -- `Pairs`, on the reactor's thread ------------------------------------------------------------------------

    def find(self, key: HandoffKey) -> Ticket | None:
        return self._tickets.get(key)

    def open(self, connection: NcclConnection, deadline: float) -> Link:
        return self._issuer.open(RECEIVER, b"", deadline, partial(self._changed_elsewhere, connection))

    def post(self, link: Link, key: HandoffKey, group: list[Span], deadline: float) -> int:
        number = link.posted + 1
        self._writing.setdefault(key, {})[link] = number
        self._issuer.post(link, group, None, deadline)
        return number

    def abort(self, link: Link, why: str) -> None:
        self._issuer.abort(link, why)

    def _changed_elsewhere(self, connection: NcclConnection, link: Link) -> None:
        assert self._reactor is not None
        self._reactor.call(partial(self._changed, connection, link))

    def _changed(self, connection: NcclConnection, link: Link) -> None:
        self._written(link)
        if connection.link is link and connection.socket.fileno() in self._connections:
            self._step(connection, connection.advance)

    def _written(self, link: Link) -> None:
        """Note which receives of this communicator are over, and report what that proves."""
        assert self._events is not None
        for key, groups in list(self._writing.items()):
            if link in groups and (link.gone or link.completed >= groups[link]):
                del groups[link]
                if not groups:
                    del self._writing[key]
        proven = [key for key in self._revoking if key not in self._writing]
        self._revoking = [key for key in self._revoking if key in self._writing]
        for key in proven:
            self._events.revoked(key)

    def _revoke(self, key: HandoffKey) -> None:
        assert self._events is not None
        for connection in list(self._connections.values()):
            self._step(connection, partial(connection.revoke, key))
        if key in self._writing:
            self._revoking.append(key)
        else:
            self._events.revoked(key)

    # -- connections ---------------------------------------------------------------------------------------------

    def _listen(self, host: str, advertise: str | None) -> None:
        if host in WILDCARDS and not advertise:
            raise ConfigError(f"kv transfer binds {host or 'all addresses'}: say which address writers are to use")
        try:
            family, _, _, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
            self._listener = socket.create_server(address[:2], family=family, backlog=128)
        except OSError as error:
            raise ConfigError(f"kv transfer can't listen on {host}: {error}") from error
        self._listener.setblocking(False)
        shown = advertise or host
        shown = f"[{shown}]" if ":" in shown else shown
        self._endpoint = f"{shown}:{self._listener.getsockname()[1]}"
        self._reactor = Reactor("kv-nccl")
        self._reactor.listen(self._listener, self._accept)

    def _accept(self, peer: socket.socket) -> None:
        assert self._reactor is not None
        assert self._events is not None
        if len(self._connections) >= MAX_CONNECTIONS:
            log.warning("nccl: refused a writer: %d connections are open", len(self._connections))
            peer.close()
            return
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_SECONDS)
        connection = NcclConnection(peer, self.memory, self._events, self)
        fd = peer.fileno()
        self._connections[fd] = connection
        self._reactor.watch(fd, partial(self._readable, connection), partial(self._late, connection))
        self._reactor.limit(fd, HELLO_SECONDS)

    def _readable(self, connection: NcclConnection, _events: int) -> None:
        self._step(connection, connection.read)

    def _step(self, connection: NcclConnection, step: Callable[[], None]) -> None:
        """Let the connection do something, which may be the end of it; then bound what its writer may take next."""
        assert self._reactor is not None
        try:
            step()
        except Broken as why:
            self._drop(connection, str(why))
            return
        seconds = None if connection.idle else STALL_SECONDS
        if connection.batch is not None:
            seconds = connection.until - time.monotonic() + GRACE_SECONDS
        if connection.incarnation:
            self._reactor.limit(connection.socket.fileno(), seconds)

    def _late(self, connection: NcclConnection) -> None:
        self._drop(connection, "the writer stopped in the middle")

    def _drop(self, connection: NcclConnection, why: str) -> None:
        assert self._reactor is not None
        fd = connection.socket.fileno()
        if self._connections.pop(fd, None) is None:
            return
        log.debug("nccl: closed a connection: %s", why)
        self._reactor.forget(fd)
        connection.close()

    def _close_all(self) -> None:
        assert self._reactor is not None
        assert self._listener is not None
        self._reactor.forget(self._listener.fileno())
        self._listener.close()
        for connection in list(self._connections.values()):
            self._drop(connection, "the receiver closes")
