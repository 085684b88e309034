"""A worker service behind a real server, and what a router says to it and reads."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import grpc

from baton.messages import CancelCommand, Command
from baton.rpc.net import Server
from baton.v1 import worker_pb2 as wire
from baton.v1.worker_pb2_grpc import WorkerStub
from baton.worker.service import WorkerService
from baton.worker.session import RouterSession


class Handler:
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.commands: list[str] = []
        self.lost: list[str] = []
        self.on_cancel: Callable[[], None] = lambda: None

    def on_command(self, router: RouterSession, command: Command) -> None:
        self.on_cancel()
        assert isinstance(command, CancelCommand)
        self.commands.append(command.attempt.decode())

    def on_router_lost(self, router: RouterSession) -> None:
        self.lost.append(router.router.incarnation)


class Bench:
    """A worker service behind a real server."""

    def __init__(self, server: Server, worker: WorkerService, handler: Handler, channel: grpc.aio.Channel) -> None:
        self.server, self.worker, self.handler = server, worker, handler
        self.stub = WorkerStub(channel)

    async def attach(self, incarnation: str = "r-1", session: str = "s-1", received: int = 0) -> Any:
        """A call, and the answer to its hello."""
        call: Any = self.stub.Attach()
        router = wire.ProcessId(name="r", incarnation=incarnation, address="here")
        await call.write(wire.RouterFrame(hello=wire.Hello(process=router, session=session, received=received)))
        return call, (await call.read()).hello

    @property
    def session(self) -> RouterSession:
        (session,) = self.worker.sessions
        return session


def cancel(number: int) -> wire.RouterFrame:
    return wire.RouterFrame(number=number, cancel=wire.CancelCommand(attempt=str(number).encode()))


async def freed(call: Any) -> wire.WorkerFrame:
    """The next frame that is no heartbeat."""
    while (frame := await call.read()).WhichOneof("body") == "heartbeat":
        pass
    assert isinstance(frame, wire.WorkerFrame)
    return frame


async def rest(call: Any) -> list[wire.WorkerFrame]:
    """All further frames that are no heartbeats; the stream has to end in order."""
    frames = []
    while isinstance(frame := await call.read(), wire.WorkerFrame):
        if frame.WhichOneof("body") != "heartbeat":
            frames.append(frame)
    return frames


ARTIFACTS = {hashlib.sha256(data).hexdigest(): data for data in (b"x" * 200_000, b"small")}
