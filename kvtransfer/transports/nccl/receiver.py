"""NCCL between pools in CUDA memory: device to device, without a copy through the host.

A pair of processes shares a communicator of two ranks, made when the first batch needs it. NCCL has no one-sided write,
no deadline, and does not notice a peer's death; so a batch is agreed over a control connection before either side posts
it, and every wait ends with an abort. Proof that a grant is written no more is that no receive of it is posted: none
ever was, the last one has completed, or its communicator's abort has returned and the stream is drained.
"""

from __future__ import annotations

import socket
import time
from functools import partial

from baton.spec import HandoffKey
from kvtransfer.transports.base import BlockMemory, ReceiverEvents
from kvtransfer.transports.nccl.connection import NcclConnection
from kvtransfer.transports.nccl.issuer import Issuer, Link
from kvtransfer.transports.nccl.seam import Span
from kvtransfer.transports.receiver import SocketReceiver
from kvtransfer.transports.sockets import STALL_SECONDS, listen_on, split_endpoint

HELLO_SECONDS = 10.0
GRACE_SECONDS = 5.0  # past a batch's deadline, for a writer to say that it gives up


class NcclReceiver(SocketReceiver[NcclConnection]):
    """`memory` is on the device of `issuer`, which the caller closes after this. The control port is any free one of
    `host`; writers are told `advertise`, or `host`. Raises `ConfigError` where the address can't be bound.
    """

    kind = "nccl"

    def __init__(
        self,
        memory: BlockMemory,
        events: ReceiverEvents,
        issuer: Issuer,
        *,
        host: str = "127.0.0.1",
        advertise: str | None = None,
    ) -> None:
        self._memory = memory
        self._issuer = issuer
        self._writing: dict[HandoffKey, dict[Link, int]] = {}  # receives that are posted: the group on that link
        self._revoking: list[HandoffKey] = []  # waiting for proof
        listener, endpoint = listen_on(host, 0, advertise)
        self._token = split_endpoint(endpoint)[1]
        super().__init__(events, listener, endpoint, HELLO_SECONDS)

    def _connection(self, peer: socket.socket) -> NcclConnection:
        def changed(connection: NcclConnection, link: Link) -> None:
            self._reactor.call(partial(self._changed, connection, link))

        find, post = self._tickets.get, self._post
        return NcclConnection(peer, self._memory, self._events, self._issuer, find, post, changed, self._token)

    def _post(self, link: Link, key: HandoffKey, group: list[Span], deadline: float) -> int:
        number = link.posted + 1
        self._writing.setdefault(key, {})[link] = number
        self._issuer.post(link, group, None, deadline)
        return number

    def _changed(self, connection: NcclConnection, link: Link) -> None:
        self._written(link)
        if connection.link is link and connection.socket.fileno() in self._connections:
            self._step(connection, connection.advance)

    def _written(self, link: Link) -> None:
        """Note which receives of this communicator are over, and report the proofs."""
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
        for connection in list(self._connections.values()):
            self._step(connection, partial(connection.revoke, key))
        if key in self._writing:
            self._revoking.append(key)
        else:
            self._events.revoked(key)

    def _bound(self, connection: NcclConnection) -> None:
        seconds = None if connection.idle else STALL_SECONDS
        if connection.batch is not None:
            seconds = connection.until - time.monotonic() + GRACE_SECONDS
        if connection.incarnation:
            self._reactor.limit(connection.socket.fileno(), seconds)
