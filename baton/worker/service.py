"""The Worker service: one multiplexed stream per router, and the model card's files.

A router whose connection ended is gone: its session outlives the stream by the grace time. A router that is silent on
an open connection may only be suspended, or behind a network that drops packets: it is waited for much longer, while
its sequences go on. When it is lost, `RoleHandler.on_router_lost` frees all that the router had placed here.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any, Protocol

import structlog

from baton import errors
from baton.messages import CancelCommand, Command, Ended, Pulse
from baton.rpc import awake
from baton.rpc.convert import process_from_wire, process_to_wire
from baton.rpc.frames import attempt_of, command_from_frame, pulse_to_heartbeat
from baton.rpc.greeting import agree_on_version, check_receiver
from baton.rpc.lanes import FRAGMENT_BYTES
from baton.rpc.link import GRACE_S, SILENCE_S, read_frames
from baton.rpc.net import cancelling
from baton.rpc.status import abort
from baton.spec import AttemptKey, ProcessRef
from baton.telemetry import Counts
from baton.v1 import worker_pb2 as wire
from baton.v1.worker_pb2_grpc import WorkerServicer
from baton.worker.session import RouterSession

HOLD_S = 60.0
"""How long a silent router is waited for."""
DIGEST = re.compile("[0-9a-fA-F]{64}")
log = structlog.get_logger(__name__)


class RoleHandler(Protocol):
    """Called on the event loop; must not block."""

    def on_command(self, router: RouterSession, command: Command) -> None:
        """Called with each command once and in order; ignores those for another role."""

    def on_router_lost(self, router: RouterSession) -> None:
        """Ends all sequences of this router."""


class WorkerService(WorkerServicer):
    """Serves `Worker`. `artifacts` maps SHA-256 (hexadecimal) to bytes."""

    def __init__(
        self, process: ProcessRef, artifacts: dict[str, bytes], counts: Counts, hold_s: float = HOLD_S
    ) -> None:
        self._process, self._artifacts, self._counts, self._hold_s = process, artifacts, counts, hold_s
        self._sessions: dict[str, RouterSession] = {}
        self._handlers: list[RoleHandler] = []
        self.on_attach: list[Callable[[RouterSession], None]] = []
        self.pulse: Callable[[], Pulse | None] = lambda: None
        """Of the engine, while the worker has sequences."""
        self.attached, self.detached = asyncio.Event(), asyncio.Event()
        self.detached.set()

    def add_handler(self, handler: RoleHandler) -> None:
        self._handlers.append(handler)

    def session(self, router: ProcessRef) -> RouterSession | None:
        """The session of exactly this incarnation, if there is one."""
        return self._sessions.get(router.incarnation)

    @property
    def sessions(self) -> list[RouterSession]:
        """Of all routers that are attached or within their grace time."""
        return list(self._sessions.values())

    async def Attach(
        self, request_iterator: AsyncIterator[wire.RouterFrame], context: Any
    ) -> AsyncIterator[wire.WorkerFrame]:
        try:
            async with asyncio.timeout(SILENCE_S):
                first = await anext(request_iterator)
        except (StopAsyncIteration, TimeoutError):
            await abort(context, errors.InvalidArgument("hello", "a stream starts with a hello"))
        if first.WhichOneof("body") != "hello" or not first.hello.process.incarnation or not first.hello.session:
            await abort(context, errors.InvalidArgument("hello", "must name the process, its incarnation, the session"))
        try:
            check_receiver(first.hello.receiver, self._process)
            version = agree_on_version(first.hello)
        except errors.Mismatch as error:
            self._counts.add("hellos_refused")
            log.warning("hello refused", router=first.hello.process.name, error=str(error))
            await abort(context, error)
        record, resumed, stream = self._enter(first.hello)
        try:
            process, received = process_to_wire(self._process), record.link.received
            hello = wire.Hello(process=process, session=record.session_id, received=received, resumed=resumed)
            hello.version_min = hello.version_max = version
            yield wire.WorkerFrame(hello=hello)
            reader = asyncio.create_task(self._read(record, stream, request_iterator))
            async with cancelling(reader):
                async for frame in record.link.outgoing(stream):
                    yield frame
        finally:
            self._leave(record)

    async def FetchArtifact(
        self, request: wire.FetchArtifactRequest, context: Any
    ) -> AsyncIterator[wire.FetchArtifactResponse]:
        try:
            check_receiver(request.receiver, self._process)
        except errors.Mismatch as error:
            await abort(context, error)
        if not DIGEST.fullmatch(request.sha256):
            await abort(context, errors.InvalidArgument("sha256", "must have 64 hexadecimal digits"))
        data = self._artifacts.get(request.sha256)
        if data is None:
            await abort(context, errors.NotFound(f"no artifact with SHA-256 {request.sha256!r} here"))
        for start in range(0, len(data), FRAGMENT_BYTES):
            yield wire.FetchArtifactResponse(data=data[start : start + FRAGMENT_BYTES])

    def close(self) -> None:
        for record in self.sessions:
            self._lose(record, "this worker stops")

    def _enter(self, hello: wire.Hello) -> tuple[RouterSession, bool, int]:
        router = process_from_wire(hello.process)
        for other in self.sessions:
            if other.router.name == router.name and other.router.incarnation != router.incarnation:
                self._lose(other, "the router restarted")
        record = self._sessions.get(router.incarnation)
        resumed = record is not None and record.session_id == hello.session and not record.link.closed
        if record is not None and not resumed:
            self._lose(record, "the router started a new session")
        if record is None or not resumed:
            record = self._sessions[router.incarnation] = RouterSession(router, hello.session, self._dispatch)
            record.link.pulse = self._heartbeat
        if record.grace is not None:
            record.grace.cancel()
            record.grace = None
        record.streams += 1
        stream = record.link.attach(hello.received)
        log.info("router attached", router=router.name, resumed=resumed)
        if not resumed:
            for tell in self.on_attach:
                tell(record)
        return record, resumed, stream

    def _heard(self, record: RouterSession, silence: awake.Timer) -> None:
        """The router has our hello: from now on, and not before, it places requests here."""
        silence.restart()
        if self._sessions.get(record.router.incarnation) is record:
            self.attached.set()
            self.detached.clear()

    async def _read(self, record: RouterSession, stream: int, source: AsyncIterator[wire.RouterFrame]) -> None:
        silence = awake.Timer(SILENCE_S, partial(self._silent, record))
        try:
            await read_frames(record.link, source, self._hold_s, lambda _: self._heard(record, silence))
        except TimeoutError:
            log.warning("router given up", router=record.router.name, error=f"silent for {self._hold_s:g} s")
            record.link.close()
        except errors.TransferError as error:
            log.warning("stream broken off", router=record.router.name, error=str(error))
        except (errors.ResourceExhausted, errors.InvalidArgument) as error:
            log.warning("router given up", router=record.router.name, error=str(error))
            record.link.close()
        finally:
            silence.cancel()
            record.link.detach(stream)

    def _heartbeat(self) -> wire.Heartbeat | None:
        pulse = self.pulse()
        return None if pulse is None else pulse_to_heartbeat(pulse)

    def _silent(self, record: RouterSession) -> None:
        self._counts.add("routers_silent")
        log.warning("router is silent; its sequences go on", router=record.router.name, hold_s=self._hold_s)

    def _leave(self, record: RouterSession) -> None:
        record.streams -= 1
        if record.streams or self._sessions.get(record.router.incarnation) is not record:
            return
        if record.link.closed:
            self._lose(record, "its stream can't be taken up again")
            return
        record.link.detach()
        late = "it did not come back within the grace time"
        record.grace = awake.Timer(GRACE_S, lambda: self._lose(record, late))

    def _dispatch(self, record: RouterSession, frame: wire.RouterFrame) -> None:
        try:
            command = command_from_frame(frame)
        except errors.InvalidArgument as error:
            record.send(Ended(attempt_of(frame), error=errors.Internal(str(error))))
            return
        if command is None:
            return  # a newer router's
        for handler in self._handlers:
            try:
                handler.on_command(record, command)
            except Exception as error:  # a boundary: one command fails, the stream and all other requests go on
                self._counts.add("commands_failed")
                log.error("a command failed", kind=type(command).__name__, exc_info=error)
                self._fail(record, handler, attempt_of(frame), f"{type(error).__name__}: {error}")

    def _fail(self, record: RouterSession, handler: RoleHandler, attempt: AttemptKey, reason: str) -> None:
        """Ends the attempt of a command that failed, and frees first what the attempt holds."""
        if not attempt:
            return
        try:
            handler.on_command(record, CancelCommand(attempt, reason))
        except Exception as error:
            log.error("what a failed command took could not be freed", exc_info=error)
        record.send(Ended(attempt, error=errors.Internal(f"the worker failed: {reason}")))

    def _lose(self, record: RouterSession, reason: str) -> None:
        if record.grace is not None:
            record.grace.cancel()
        self._sessions.pop(record.router.incarnation, None)
        record.link.close()
        self._counts.add("routers_lost")
        log.info("router lost", router=record.router.name, reason=reason)
        for handler in self._handlers:
            handler.on_router_lost(record)
        if not self._sessions:
            self.attached.clear()
            self.detached.set()
