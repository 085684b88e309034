"""A pair's control stream to a real server, whose answers a test writes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

from baton.rpc.net import service
from baton.spec import ProcessRef, RefusalReason
from baton.v1 import transfer_pb2 as wire
from baton.v1.transfer_pb2_grpc import TransferServicer, add_TransferServicer_to_server
from baton.worker.handshake import handshake_of
from baton.worker.sending.pair import PairStream
from kvtransfer.transports.base import Channel, Writer
from tests.kvtransfer.transports.harness import LAYOUT
from tests.rpc.servers import start_server
from tests.rpc.waiting import until


class Answering(TransferServicer):
    """Answers each handshake with these endpoints, and renews the lease."""

    def __init__(self, endpoints: Sequence[tuple[str, str]], lease_s: float) -> None:
        self.endpoints, self.lease_ms = endpoints, int(lease_s * 1e3)
        self.handshakes = self.renewals = 0
        self.broken = asyncio.Event()

    async def Handoff(self, request_iterator: AsyncIterator[wire.SenderFrame], context: Any) -> AsyncIterator[Any]:
        async for frame in request_iterator:
            if frame.WhichOneof("body") == "handshake":
                self.handshakes += 1
                answer = wire.HandshakeResponse(process=wire.HandshakeResponse().process, lease_ms=self.lease_ms)
                answer.process.incarnation = "d-1"
                answer.endpoints.extend(wire.Endpoint(transport=kind, address=at) for kind, at in self.endpoints)
                yield wire.ReceiverFrame(handshake=answer)
            elif frame.WhichOneof("body") == "renew":
                self.renewals += 1
                yield wire.ReceiverFrame(renewed=wire.RenewResponseFrame(lease_ms=self.lease_ms))
            if self.broken.is_set():
                self.broken.clear()
                return


class Told:
    """A `PairEvents` that remembers."""

    has_business = False

    def __init__(self) -> None:
        self.ups = 0
        self.downs: list[tuple[RefusalReason, str]] = []
        self.channels: list[Channel] = []

    def stream_up(self) -> None:
        self.ups += 1

    def stream_down(self, reason: RefusalReason, message: str) -> None:
        self.downs.append((reason, message))

    def take(self, frame: wire.ReceiverFrame) -> None: ...

    async def move(self, channel: Channel) -> None:
        self.channels.append(channel)
        await asyncio.Event().wait()


class Bench:
    """A pair's stream to a real server."""

    def __init__(self, stream: PairStream, told: Told, answering: Answering) -> None:
        self.stream, self.told, self.answering = stream, told, answering

    async def up(self) -> str:
        """The transport, once it is up."""
        self.stream.want()
        await until(lambda: self.stream.up, f"the stream up: {self.told.downs}")
        return self.stream.transport

    async def down(self) -> tuple[RefusalReason, str]:
        """Why it did not come up."""
        self.stream.want()
        await until(lambda: self.told.downs, "the stream down")
        return self.told.downs[0]


@asynccontextmanager
async def bench(
    writers: dict[str, Writer], endpoints: Sequence[tuple[str, str]] | None = None, lease_s: float = 30.0
) -> AsyncIterator[Bench]:
    """Without `endpoints` every writer has one, in their order."""
    answering = Answering(endpoints or [(kind, f"at-{kind}") for kind in writers], lease_s)
    server = await start_server("127.0.0.1:0", [service(add_TransferServicer_to_server, answering, "Transfer")])
    told, peer = Told(), ProcessRef("d0", "d-1", server.address)
    with ThreadPoolExecutor(4) as executor:
        handshake = handshake_of(ProcessRef("p0", "p-1", ""), "f", LAYOUT, writers)
        stream = PairStream(peer, handshake, writers, told, executor)
        try:
            yield Bench(stream, told, answering)
        finally:
            await stream.stop()
            await server.stop(0)
