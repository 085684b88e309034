"""TCP between any two hosts: sent from the writer's pool without assembling, received straight into granted blocks.

One thread serves all writers of a receiver. A batch names its grant's key, generation, write token and blocks, which
are checked before a byte is placed. Since the same thread reads and revokes, a revoke is proof once it has run there:
the ticket is gone, and the rest of a batch that was under way is read into nothing. The connection serves others yet.
"""

from __future__ import annotations

import socket
from functools import partial

from kvtransfer.blocks.memory import PoolMemory
from kvtransfer.transports.base import ReceiverEvents
from kvtransfer.transports.batches import BatchConnection, BatchPhase
from kvtransfer.transports.receiver import Broken, SocketReceiver
from kvtransfer.transports.sockets import STALL_SECONDS, listen_on
from kvtransfer.transports.tcp import wire
from kvtransfer.transports.tcp.tls import CLIENT_HELLO, TlsContexts, TlsStream, tcp_flags
from kvtransfer.transports.wire import REVOKED, Flags, Status

SCRATCH_BYTES = 256 * 1024


class TcpConnection(BatchConnection):
    HELLO_BYTES = wire.HELLO.size
    tls: TlsContexts | None = None
    """Until the writer's first byte has come."""

    def read(self) -> None:
        if self.tls is not None:
            self._choose(self.tls)
        super().read()

    def _choose(self, tls: TlsContexts) -> None:
        """TLS, unless the writer starts without: then it is told so, in plain, by the flags of our HELLO."""
        try:
            first = self.socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return
        except OSError as error:
            raise Broken(str(error)) from error
        if CLIENT_HELLO.startswith(first):
            self.stream = tls.accept(self.socket)
        self.tls = None

    def _hello(self) -> None:
        magic, version, flags, block_bytes = wire.HELLO.unpack(self._message)
        mine = self._memory.layout.block_bytes
        if magic != wire.MAGIC and not self._message.startswith(CLIENT_HELLO):
            raise Broken("not a writer of ours")
        self.send(wire.HELLO.pack(wire.MAGIC, wire.VERSION, self._flags, mine))  # in plain to one that wants TLS
        theirs = (isinstance(self.stream, TlsStream), magic, version, flags, block_bytes)
        if theirs != (Flags.TLS in self._flags, wire.MAGIC, wire.VERSION, self._flags, mine):
            self.stream.drain()  # bytes left unread would reset the connection, and our answer with it
            raise Broken("the handshake differs")
        self._next_batch()

    def _granted(self) -> None:
        blocks = [self._memory.block(entry.destination) for entry in self._entries]
        self._fill(BatchPhase.FILLING, blocks, self._filled)

    def _refused(self, why: str) -> None:
        """The bytes come all the same."""
        self._drain(len(self._entries) * self._memory.layout.block_bytes, why)

    def stop(self) -> None:
        self._drain(sum(len(vector) for vector in self._vectors), REVOKED)

    def _drain(self, size: int, why: str) -> None:
        """Reads so many bytes over and over into the same scratch, and answers then."""
        times, left = divmod(size, SCRATCH_BYTES)
        scratch = memoryview(bytearray(SCRATCH_BYTES if times else left))
        vectors = [scratch] * times + [scratch[:left]] * (left > 0)
        self._fill(BatchPhase.DRAIN, vectors, partial(self._answer, Status.REFUSED, why))


class TcpReceiver(SocketReceiver[TcpConnection]):
    """Listens as `listen_on` does, and raises as it does. `checksums` (CRC-32 of each block) and whether there is `tls`
    must be the same on both sides."""

    kind = "tcp"

    def __init__(
        self,
        memory: PoolMemory,
        events: ReceiverEvents,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        advertise: str | None = None,
        advertise_port: int = 0,
        checksums: bool = False,
        tls: TlsContexts | None = None,
        stall_s: float = STALL_SECONDS,
    ) -> None:
        self._memory = memory
        self._flags = tcp_flags(checksums, tls)
        self._tls = tls
        super().__init__(events, *listen_on(host, port, advertise, advertise_port), stall_s)

    def _connection(self, peer: socket.socket) -> TcpConnection:
        connection = TcpConnection(peer, self._memory, self._flags, self._events, self._tickets.get)
        connection.tls = self._tls
        return connection
