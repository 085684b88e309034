"""The router's end of the multiplexed stream to one worker.

    CONNECTING -> ATTACHED <-> BROKEN -> LOST | CLOSED

A broken stream is taken up again within the grace time, and nothing is lost. The worker is LOST at once when its
address refuses connections, when another incarnation answers, or when it no longer knows the session; else when the
grace time is over. LOST and CLOSED are final.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import structlog

from baton.errors import BatonError, InvalidArgument, Mismatch, ResourceExhausted, TransferError, Unimplemented
from baton.messages import Command, Event
from baton.rpc import awake, link, net
from baton.rpc.convert import process_to_wire
from baton.rpc.frames import command_to_frame, event_from_frame, pulse_of
from baton.rpc.greeting import RECEIVER, agree_on_version, with_versions
from baton.rpc.link import GRACE_S, Session, read_frames
from baton.rpc.status import from_rpc_error
from baton.spec import ProcessRef
from baton.v1 import worker_pb2 as wire
from baton.v1.worker_pb2_grpc import WorkerStub
from router.workers.pulse import Watch

HELLO_S = 2.0
RETRY_S = 0.05
PROBE_S = 0.25
FAREWELL_S = 1.0
log = structlog.get_logger(__name__)


class Gone(Exception):
    """The worker is lost; another try is of no use. `disproved`: its address is not its own."""

    def __init__(self, why: str, disproved: bool = False) -> None:
        super().__init__(why)
        self.disproved = disproved


def disproves(error: BatonError) -> bool:
    """Whether an answer shows that an address belongs to another process than the worker, or to no worker at all."""
    return isinstance(error, Unimplemented) or (isinstance(error, Mismatch) and error.field == RECEIVER)


class WorkerLink:
    """Sends commands to a worker and hands its events to `on_event`, in order and each once, across broken streams.
    An event of a kind that is unknown here is None.

    `on_state` is called when the stream comes up or breaks; `on_lost(reason)` once, unless `close` came first. All
    callbacks run on the event loop and must not raise.
    """

    def __init__(
        self,
        worker: ProcessRef,
        router: ProcessRef,
        *,
        on_event: Callable[[Event | None], None],
        on_state: Callable[[], None],
        on_lost: Callable[[str], None],
        busy: Callable[[], bool] = lambda: False,
        on_stalled: Callable[[str], None] = lambda _: None,
    ) -> None:
        """`busy`: whether the worker has sequences of ours; `on_stalled(reason)` is called while they don't move."""
        self.attached = False
        self.disproved = False
        """Lost, because another process answers at the worker's address."""
        self.breaks = 0
        self._worker, self._router = worker, router
        self._on_state, self._on_lost, self._on_stalled = on_state, on_lost, on_stalled
        self.watch = Watch(busy, self._moves_or_not, lambda: self._on_stalled(self.watch.stalled))
        self._session: Session[wire.RouterFrame, wire.WorkerFrame] = Session(
            wire.RouterFrame, wire.WorkerFrame, worker.name, lambda frame: on_event(event_from_frame(frame))
        )
        self._session_id = str(uuid.uuid4())
        self._known = False  # by the worker, which has taken up this session before
        self._overrun = ""
        self._closing = False
        self._call: grpc.aio.StreamStreamCall[wire.RouterFrame, wire.WorkerFrame] | None = None
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name=f"link to {self._worker.name}")

    def send(self, command: Command) -> None:
        """Queues a command, which reaches the worker unless that is lost."""
        try:
            self._session.send(command_to_frame(command))
        except ResourceExhausted as error:
            self._overrun = str(error)
            if self._call is not None:
                self._call.cancel()

    async def close(self) -> None:
        """Ends the stream in order, so that the worker frees our sequences at once; waits up to FAREWELL_S for it."""
        self._closing = True
        call, task = self._call, self._task
        if call is not None and self.attached:
            self._session.detach()
            try:
                async with asyncio.timeout(FAREWELL_S):
                    await call.done_writing()
                    await call.code()
            except (TimeoutError, grpc.aio.AioRpcError, asyncio.InvalidStateError):
                log.debug("worker did not answer the farewell", worker=self._worker.name)
        self._session.close()
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def abandon(self) -> None:
        """Ends the stream without a call of `on_lost`: the caller has found that the worker is lost."""
        self._closing = True
        self._session.close()
        if self._task is not None and self._task is not asyncio.current_task():
            self._task.cancel()

    async def wait_closed(self) -> None:
        """After `abandon`: until the connection is closed."""
        if self._task is not None:
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        try:
            gone = await self._serve()
        except Exception as error:
            log.error("unexpected error on a worker's stream", worker=self._worker.name, exc_info=error)
            gone = Gone("internal error on its stream")
        finally:
            self.attached = False
            self._session.close()
        if not self._closing:
            self.disproved = gone.disproved
            self._on_lost(str(gone))

    async def _serve(self) -> Gone:
        """Opens the stream again whenever it breaks; returns why the worker is lost."""
        clock = awake.now
        broken_since = clock()
        while True:
            cause = await self._connect_once()
            if isinstance(cause, Gone):
                return cause
            if self._closing:
                return Gone(cause)
            if self.attached:
                self.attached, self.breaks, broken_since = False, self.breaks + 1, clock()
                self._on_state()
            if self._overrun:
                return Gone(self._overrun)
            if not await net.listens(self._worker.address, PROBE_S):
                return Gone(f"nobody listens at {self._worker.address} any more")
            if clock() - broken_since > GRACE_S:
                return Gone(f"no stream for {GRACE_S:g} s: {cause}")
            await asyncio.sleep(RETRY_S)

    async def _connect_once(self) -> Gone | str:
        """One stream, from its opening to its end; returns its cause."""
        try:
            async with net.open_channel(self._worker.address) as channel:
                await self._hold(WorkerStub(channel).Attach())
        except Gone as gone:
            return gone
        except grpc.aio.AioRpcError as error:
            return self._verdict(from_rpc_error(error))
        except asyncio.InvalidStateError:
            return "the stream broke"
        except TimeoutError:
            return "the worker is silent"
        except TransferError as error:
            return str(error)
        except (ResourceExhausted, InvalidArgument) as error:
            return Gone(f"a message of its is lost: {error}")
        except Mismatch as error:
            return self._verdict(error)
        finally:
            self._call = None
        return "the worker ended the stream"

    def _moves_or_not(self) -> None:
        if self.watch.stalled:
            log.warning("worker stalled", worker=self._worker.name, reason=self.watch.stalled)
        else:
            log.info("worker moves again", worker=self._worker.name)
        self._on_state()

    def _verdict(self, error: BatonError) -> Gone | str:
        """What an error of the call says of the worker."""
        if isinstance(error, (Mismatch, Unimplemented)):
            return Gone(f"at {self._worker.address}: {error}", disproves(error))
        return str(error)

    async def _hold(self, call: Any) -> None:
        self._call = call
        frames = aiter(call)
        async with asyncio.timeout(HELLO_S):
            await self._greet(call, frames)
        writer = asyncio.create_task(self._write(call), name=f"writer to {self._worker.name}")
        self.attached = True
        self._on_state()
        try:
            self.watch.start()
            await read_frames(self._session, frames, link.SILENCE_S, lambda frame: self.watch.heard(pulse_of(frame)))
        finally:
            self.watch.stop()
            self._session.detach()
            writer.cancel()
            await asyncio.wait([writer])
            call.cancel()
        if not writer.cancelled() and (error := writer.exception()) is not None:
            raise error

    async def _greet(self, call: Any, frames: AsyncIterator[wire.WorkerFrame]) -> None:
        hello = wire.Hello(
            process=process_to_wire(self._router),
            session=self._session_id,
            received=self._session.received,
            receiver=self._worker.incarnation,
        )
        await call.write(wire.RouterFrame(hello=with_versions(hello)))
        try:
            answer = (await anext(frames)).hello
        except StopAsyncIteration:
            raise TransferError("the worker ended the stream instead of answering") from None
        if (answer.process.name, answer.process.incarnation) != (self._worker.name, self._worker.incarnation):
            raise Gone(f"another process answers at {self._worker.address}: {answer.process.name}", disproved=True)
        agree_on_version(answer)
        if self._known and not answer.resumed:
            raise Gone("it does not know the session any more")
        self._known = True
        self._session.attach(answer.received)

    async def _write(self, call: Any) -> None:
        try:
            await call.write(self._session.heartbeat())  # at once: the worker may call itself ready
            async for frame in self._session.outgoing():
                await call.write(frame)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            call.cancel()  # the reader sees the same end and reports it
