"""A worker's session with one router."""

from __future__ import annotations

from collections.abc import Callable

import structlog

from baton import errors
from baton.messages import Event, TokenRun, Tokens
from baton.rpc.awake import Timer
from baton.rpc.frames import event_to_frame
from baton.rpc.link import Session
from baton.spec import ProcessRef
from baton.v1 import worker_pb2 as wire

BACKLOG_FRAMES, CAUGHT_UP_FRAMES = 2048, 256
"""A router that has not seen so many frames is behind until it lacks only the latter. A step's tokens are one frame, so
the first is also the most tokens of one stream that a router which wakes gets at once: it buffers twice as many."""
log = structlog.get_logger(__name__)


class RouterSession:
    """`link` numbers and keeps the frames; `grace` is set while no stream is up."""

    def __init__(
        self, router: ProcessRef, session_id: str, on_frame: Callable[[RouterSession, wire.RouterFrame], None]
    ) -> None:
        self.router, self.session_id = router, session_id
        self.link: Session[wire.WorkerFrame, wire.RouterFrame] = Session(
            wire.WorkerFrame, wire.RouterFrame, f"to {router.name}", lambda frame: on_frame(self, frame)
        )
        self.streams = 0
        self._behind = False
        self.grace: Timer | None = None

    @property
    def behind(self) -> bool:
        """Whether its sequences should pause, so that what waits for it stays bounded."""
        self._behind = self.link.pending >= (CAUGHT_UP_FRAMES if self._behind else BACKLOG_FRAMES)
        return self._behind

    def send(self, event: Event) -> None:
        """Drops the event when the router is lost. Closes the link to a router that does not acknowledge."""
        try:
            self.link.send(event_to_frame(event))
        except errors.ResourceExhausted as error:
            log.warning("router does not acknowledge; given up", router=self.router.name, error=str(error))
            self.link.close()


class StepTokens:
    """The tokens of one step, gathered into one event for each router."""

    def __init__(self) -> None:
        self._runs: dict[RouterSession, list[TokenRun]] = {}

    def add(self, router: RouterSession, run: TokenRun) -> None:
        self._runs.setdefault(router, []).append(run)

    def send(self) -> None:
        for router, runs in self._runs.items():
            router.send(Tokens(runs))
