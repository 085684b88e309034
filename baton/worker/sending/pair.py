"""The control stream to one decode worker: connecting, the handshake, the lease, and coming back after a break.

DOWN -> CONNECTING -> UP -> DOWN ...        closed for good when the peer is gone or the worker stops
"""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import Executor
from typing import Protocol

import grpc
import structlog

from baton import errors
from baton.rpc.lanes import Lanes
from baton.rpc.net import listens, open_channel
from baton.rpc.status import from_rpc_error
from baton.spec import ProcessRef, RefusalReason
from baton.v1 import transfer_pb2 as wire
from baton.v1.transfer_pb2_grpc import TransferStub
from baton.worker.sending.connecting import Connected, connect_best
from kvtransfer.handoffs.leases import PeerLease
from kvtransfer.transports.base import Channel, Writer

HANDSHAKE_S = CONNECT_S = 5.0
RECONNECT_S = 0.2
IDLE_S = 300.0
log = structlog.get_logger(__name__)

Call = grpc.aio.StreamStreamCall[wire.SenderFrame, wire.ReceiverFrame]


class PairEvents(Protocol):
    """The user of the stream, on the event loop."""

    @property
    def has_business(self) -> bool:
        """Whether a broken stream should be made anew."""

    def stream_up(self) -> None:
        """The handshake is done; frames and writes can go out."""

    def stream_down(self, reason: RefusalReason, message: str) -> None:
        """All handoffs on the stream have failed."""

    def take(self, frame: wire.ReceiverFrame) -> None: ...

    async def move(self, channel: Channel) -> None:
        """Writes blocks while the stream is up; raises when the channel breaks."""


class PairStream:
    """The stream to one incarnation of a decode worker. Once `closed`, it is never up again."""

    def __init__(
        self,
        peer: ProcessRef,
        handshake: wire.HandshakeRequest,
        transports: dict[str, Writer],
        events: PairEvents,
        executor: Executor,
    ) -> None:
        self.peer = peer
        self.closed = self.up = False
        self.transport = ""
        """The blocks' transport while the stream is up: one for all of its handoffs."""
        self.note = ""
        """Why a better one could not be used."""
        self.heard = 0
        """The peer has acted on so many frames of the stream: it has answered a later renewal."""
        self._sent = 0
        self._handshake, self._transports, self._events, self._executor = handshake, transports, events, executor
        self._lanes: Lanes[wire.SenderFrame] = Lanes(wire.SenderFrame)
        self._lease = PeerLease()
        self._renewed = asyncio.Event()
        self._gone = False
        self._wanted = asyncio.Event()
        self._task = asyncio.create_task(self._run(), name=f"stream to {peer.name}")

    def want(self) -> None:
        """Connects, if the stream is down."""
        self._wanted.set()

    def send(self, **body: object) -> int:
        """Queues a frame; only while the stream is up. Returns the number to compare with `heard`, for small frames:
        large ones may be overtaken."""
        assert self.up, "nothing is sent on a stream that is down"
        self._lanes.put(wire.SenderFrame(**body))  # type: ignore[arg-type]
        self._sent += 1
        return self._sent

    def may_write(self) -> bool:
        """Whether the lease on the peer's grants is valid. Safe on any thread."""
        return self._lease.valid(time.monotonic())

    async def stop(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._end("this worker stops")

    async def _run(self) -> None:
        while await self._until_wanted():
            reason, message = RefusalReason.UNREACHABLE, "the control stream ended"
            try:
                await self._converse()
            except errors.Mismatch as error:
                reason, message = RefusalReason.MISMATCH, str(error)
            except grpc.aio.AioRpcError as error:
                message = str(from_rpc_error(error))
            except (errors.BatonError, asyncio.InvalidStateError, TimeoutError) as error:
                message = str(error) or type(error).__name__
            except Exception as error:  # a boundary: this stream fails, the next one may work
                log.error("unexpected error on a control stream", peer=self.peer.name, exc_info=error)
                message = f"{type(error).__name__}: {error}"
            log.info("control stream down", peer=self.peer.name, reason=message)
            self._events.stream_down(reason, f"{self.peer.name}: {message}")
            if self._gone or not await self._listens():
                break  # the process is gone, and the granted memory with it
            if self._events.has_business:
                self._wanted.set()
            await asyncio.sleep(RECONNECT_S)
        self._end(f"{self.peer.name} is gone")

    async def _listens(self) -> bool:
        try:
            return await listens(self.peer.address)
        except errors.ConfigError:  # no address at all
            return False

    async def _until_wanted(self) -> bool:
        """False after `IDLE_S` without a wish; a later bind makes a new sender."""
        try:
            async with asyncio.timeout(IDLE_S):
                await self._wanted.wait()
        except TimeoutError:
            return False
        self._wanted.clear()
        return True

    async def _converse(self) -> None:
        async with open_channel(self.peer.address) as connection:
            call: Call = TransferStub(connection).Handoff()
            try:
                found = await self._connect(await self._shake_hands(call))
                try:
                    self._come_up(found)
                    move = self._events.move(found.channel)
                    async with asyncio.TaskGroup() as group:
                        for pump in (self._read(call), self._write(call), self._renew(), move):
                            group.create_task(pump)
                finally:
                    found.channel.close()
            except BaseExceptionGroup as group_error:
                raise _first(group_error) from None
            finally:
                self.up = False
                call.cancel()

    async def _shake_hands(self, call: Call) -> dict[str, str]:
        """The endpoints that both sides can use, by transport, best first."""
        self._lease = PeerLease()
        self._lease.asked(time.monotonic())
        try:
            async with asyncio.timeout(HANDSHAKE_S):
                handshake = wire.HandshakeRequest(receiver=self.peer.incarnation)
                handshake.MergeFrom(self._handshake)
                await call.write(wire.SenderFrame(handshake=handshake))
                frame = await call.read()
        except TimeoutError:
            raise errors.DeadlineExceeded(f"no answer to the handshake within {HANDSHAKE_S:g} s") from None
        if not isinstance(frame, wire.ReceiverFrame) or frame.WhichOneof("body") != "handshake":
            raise errors.PeerClosed("no answer to the handshake")
        answer = frame.handshake
        if answer.process.incarnation != self.peer.incarnation:
            self._gone = True
            raise errors.PeerClosed(f"it has restarted, or its address is {answer.process.name}'s now")
        if answer.HasField("mismatch"):
            wrong = answer.mismatch
            raise errors.Mismatch(wrong.field, wrong.sender_value, wrong.receiver_value)
        self._lease.granted(answer.lease_ms / 1e3)
        usable = {end.transport: end.address for end in answer.endpoints if end.transport in self._transports}
        if not usable:
            raise errors.Mismatch("transports", ", ".join(self._transports), "none of them")
        return usable

    async def _connect(self, endpoints: dict[str, str]) -> Connected:
        """Leaves a third of the lease for its renewal."""
        lease_left = (self._lease.deadline or 0.0) - time.monotonic()
        seconds = min(CONNECT_S, lease_left * 2 / 3)
        return await connect_best(endpoints, self._transports, self.peer, self._executor, seconds)

    def _come_up(self, found: Connected) -> None:
        self.transport, self.note = found.transport, found.note
        self._lanes.clear()
        self._sent = self.heard = 0
        self.up = True
        self._events.stream_up()
        about = {"peer": self.peer.name, "transport": self.transport}
        if self.note:
            log.warning("control stream up", **about, not_used=self.note)
        else:
            log.info("control stream up", **about)

    async def _read(self, call: Call) -> None:
        while isinstance(frame := await call.read(), wire.ReceiverFrame):
            if frame.WhichOneof("body") == "renewed":
                self._lease.granted(frame.renewed.lease_ms / 1e3)
                self._renewed.set()
            else:
                self._events.take(frame)
        raise errors.PeerClosed("the peer ended the control stream")

    async def _write(self, call: Call) -> None:
        while True:
            frame = self._lanes.take()
            if frame is not None:
                await call.write(frame)
            else:
                await self._lanes.wait(IDLE_S)

    async def _renew(self) -> None:
        """Extends the lease in time. Raises DeadlineExceeded when the peer lets it run out."""
        while (due := self._lease.renew_at()) is not None:
            await asyncio.sleep(max(0.01, due - time.monotonic()))
            self._lease.asked(time.monotonic())
            self._renewed.clear()
            renewal = self.send(renew=wire.RenewRequestFrame())
            until = self._lease.deadline or 0.0
            try:
                async with asyncio.timeout(max(0.01, until - time.monotonic())):
                    await self._renewed.wait()
            except TimeoutError:
                raise errors.DeadlineExceeded("the lease on granted memory was not renewed") from None
            self.heard = renewal

    def _end(self, message: str) -> None:
        self.closed = True
        self._events.stream_down(RefusalReason.UNREACHABLE, message)


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
