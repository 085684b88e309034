"""A worker's session with a router: when that is too far behind."""

from __future__ import annotations

from baton.messages import Freed
from baton.spec import ProcessRef
from baton.v1 import worker_pb2 as wire
from baton.worker.session import BACKLOG_FRAMES, CAUGHT_UP_FRAMES, RouterSession


async def test_a_router_is_behind_until_it_has_caught_up() -> None:
    session = RouterSession(ProcessRef("r", "r-1", "here"), "s", lambda record, frame: None)
    frames = session.link.outgoing(session.link.attach(0))
    for number in range(BACKLOG_FRAMES):
        assert not session.behind
        session.send(Freed(str(number).encode()))
    assert session.behind
    for _ in range(BACKLOG_FRAMES):
        await anext(frames)
    assert session.behind, "they are on their way, and the router has not seen them"
    session.link.receive(wire.RouterFrame(acknowledged=BACKLOG_FRAMES - CAUGHT_UP_FRAMES))
    assert session.behind
    session.link.receive(wire.RouterFrame(acknowledged=BACKLOG_FRAMES - CAUGHT_UP_FRAMES + 1))
    assert not session.behind
