"""NIXL, the library of RDMA clusters, between any two hosts: written by the writer's agent straight into the pool.

A writer's every batch is announced on a control connection and checked before it may start, so the receiver knows at
any time which handoff's bytes may be on their way. Each pair has an agent of its own on either side. A revoke in the
middle of a batch closes the receiver's agent: its memory is not registered any more, its connections are gone and
nothing asks it for progress, so nothing of that writer can be placed. That is the proof, as a closed socket is for tcp.
"""

from __future__ import annotations

import hmac
import socket
from functools import partial
from typing import NoReturn

from kvtransfer.blocks.memory import PoolMemory
from kvtransfer.transports.base import ReceiverEvents
from kvtransfer.transports.batches import BatchConnection, BatchPhase
from kvtransfer.transports.nixl import wire
from kvtransfer.transports.nixl.agent import NixlAgent, require
from kvtransfer.transports.receiver import Broken, SocketReceiver
from kvtransfer.transports.sockets import STALL_SECONDS, listen_on, split_endpoint
from kvtransfer.transports.wire import ELSEWHERE, TOKEN_BYTES, Flags, Status, pack_ack


class NixlConnection(BatchConnection):
    """The control connection, and the agent that the blocks come through.

    The agent is asked for progress in FILLING only, and is closed with the connection: after that nothing can come.
    """

    HELLO_BYTES = wire.HELLO.size
    polled = False
    """Whether the reactor asks for progress."""
    _agent: NixlAgent | None = None
    _batches = 0

    def progress(self) -> None:
        """Called over and over in FILLING: places bytes, and answers once the write is whole."""
        assert self._agent is not None
        for notice in self._agent.notices():
            if self.phase is not BatchPhase.FILLING or notice != wire.NOTICE.pack(self._batches):
                raise Broken("a notice of no batch")
            self._batches += 1
            self._filled()

    def close(self) -> None:
        super().close()
        if self._agent is not None:
            self._agent.close()
            self._agent = None

    def _hello(self) -> None:
        magic, version, flags, block_bytes, length = wire.HELLO.unpack(self._message)
        if magic != wire.MAGIC or not length:
            raise Broken("not a writer of ours")
        if version != wire.VERSION:
            self._turn_away(wire.MAGIC, "the handshake differs")
        self._expect(BatchPhase.TOKEN, TOKEN_BYTES + length, partial(self._compare, flags, block_bytes))

    def _compare(self, flags: int, block_bytes: int) -> None:
        if not hmac.compare_digest(self._message[:TOKEN_BYTES], self._token):
            self._turn_away(ELSEWHERE, "the writer means another receiver")
        if (flags, block_bytes) != (self._flags, self._memory.layout.block_bytes):
            self._turn_away(wire.MAGIC, "the handshake differs")
        self.incarnation = self._message[TOKEN_BYTES:].decode(errors="replace")
        memory = self._memory
        self._agent = NixlAgent(f"receiver of {self.incarnation}", memory)
        pool = (memory.layout.block_bytes, memory.blocks, memory.address)
        self.send(wire.pack_welcome(self._flags, *pool, self._agent.metadata))
        self._next_batch()

    def _turn_away(self, magic: bytes, why: str) -> NoReturn:
        self.send(wire.pack_welcome(self._flags, self._memory.layout.block_bytes, 0, 0, b"", magic))
        self.stream.drain()  # bytes left unread would reset the connection, and our answer with it
        raise Broken(why)

    def _granted(self) -> None:
        self._expect(BatchPhase.FILLING, 1, self._out_of_turn)  # nothing may come here until the write is answered
        self.send(pack_ack(Status.OK))

    def _refused(self, why: str) -> None:
        self._answer(Status.REFUSED, why)

    def _out_of_turn(self) -> None:
        raise Broken("the writer speaks out of turn")


class NixlReceiver(SocketReceiver[NixlConnection]):
    """Control connections come to `host`, any port; writers are told `advertise`, or `host`. `checksums` must be the
    same on both sides. Raises `ConfigError` as `agent.require` does, or where the address can't be bound.
    """

    kind = "nixl"

    def __init__(
        self,
        memory: PoolMemory,
        events: ReceiverEvents,
        *,
        host: str = "127.0.0.1",
        advertise: str | None = None,
        checksums: bool = False,
        stall_s: float = STALL_SECONDS,
    ) -> None:
        require()
        self._memory = memory
        self._flags = Flags.CHECKSUMS if checksums else Flags(0)
        listener, endpoint = listen_on(host, 0, advertise)
        self._token = split_endpoint(endpoint)[1]
        super().__init__(events, listener, endpoint, stall_s)

    def _connection(self, peer: socket.socket) -> NixlConnection:
        return NixlConnection(peer, self._memory, self._flags, self._events, self._tickets.get, self._token)

    def _bound(self, connection: NixlConnection) -> None:
        filling = connection.phase is BatchPhase.FILLING
        if not (filling and connection.polled):  # once it is polled, its time goes on
            super()._bound(connection)
            progress = partial(self._step, connection, connection.progress) if filling else None
            self._reactor.poll(connection.socket.fileno(), progress)
        connection.polled = filling
