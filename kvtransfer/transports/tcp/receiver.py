"""TCP between any two hosts: sent from the writer's pool without assembling, received straight into granted blocks.

One thread serves all writers of a receiver. A batch names its grant's key, generation, write token and blocks, which
are checked before a byte is placed. Since the same thread reads and revokes, a revoke is proof once it has run there:
the ticket is gone, and the rest of a batch that was under way is read into nothing. The connection serves others yet.
"""

from __future__ import annotations

import hmac
import socket
from functools import partial
from typing import NoReturn

from kvtransfer.blocks.memory import PoolMemory
from kvtransfer.transports.base import ReceiverEvents
from kvtransfer.transports.batches import BatchConnection, BatchPhase
from kvtransfer.transports.receiver import Broken, SocketReceiver
from kvtransfer.transports.sockets import STALL_SECONDS, listen_on, split_endpoint
from kvtransfer.transports.tcp import wire
from kvtransfer.transports.tcp.tls import CLIENT_HELLO, TlsContexts, TlsStream, tcp_flags
from kvtransfer.transports.wire import ELSEWHERE, REVOKED, TOKEN_BYTES, Flags, Status

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
        if magic != wire.MAGIC and not self._message.startswith(CLIENT_HELLO):
            raise Broken("not a writer of ours")
        if (magic, version) != (wire.MAGIC, wire.VERSION):
            self._turn_away(wire.MAGIC, "the handshake differs")  # in plain to one that wants TLS
        self._expect(BatchPhase.TOKEN, TOKEN_BYTES, partial(self._compare, flags, block_bytes))

    def _compare(self, flags: int, block_bytes: int) -> None:
        if not hmac.compare_digest(self._message, self._token):
            self._turn_away(ELSEWHERE, "the writer means another receiver")
        theirs = (isinstance(self.stream, TlsStream), flags, block_bytes)
        if theirs != (Flags.TLS in self._flags, self._flags, self._memory.layout.block_bytes):
            self._turn_away(wire.MAGIC, "the handshake differs")
        self._answer_hello(wire.MAGIC)
        self._next_batch()

    def _turn_away(self, magic: bytes, why: str) -> NoReturn:
        self._answer_hello(magic)
        self.stream.drain()  # bytes left unread would reset the connection, and our answer with it
        raise Broken(why)

    def _answer_hello(self, magic: bytes) -> None:
        self.send(wire.HELLO.pack(magic, wire.VERSION, self._flags, self._memory.layout.block_bytes))

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
        listener, endpoint = listen_on(host, port, advertise, advertise_port)
        self._token = split_endpoint(endpoint)[1]
        super().__init__(events, listener, endpoint, stall_s)

    def _connection(self, peer: socket.socket) -> TcpConnection:
        connection = TcpConnection(peer, self._memory, self._flags, self._events, self._tickets.get, self._token)
        connection.tls = self._tls
        return connection
