"""gRPC's own thread, kept waiting while the event loop writes to many streams.

`grpc.aio` polls for completions in a thread that is woken for each of them. Where it shares a core with the event loop,
as in a process that is pinned to one, it takes that core from the loop after every write: a thousand changes of thread
for a thousand tokens. As a batch thread (see sched(7)) it does not; then one waking serves all writes of a frame.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Set

import structlog

log = structlog.get_logger(__name__)


class Poller:
    """Entered around a burst of writes, and only by the event loop's thread. Does nothing until `find` has found the
    thread, so gRPC's inner workings are no condition: without it writes cost more, and the log says so."""

    def __init__(self) -> None:
        self._thread: int | None = None

    @property
    def found(self) -> bool:
        """Whether there is a thread to keep waiting."""
        return self._thread is not None

    def find(self, before: Set[threading.Thread]) -> None:
        """It is the one thread that gRPC has started since `before` was `running()`."""
        new = [thread.native_id for thread in threading.enumerate() if thread not in before]
        if len(new) == 1 and hasattr(os, "sched_setscheduler"):
            self._thread = new[0]
        else:
            log.info("gRPC's poller can't be told apart: it won't be kept waiting", threads=len(new))

    def __enter__(self) -> None:
        if self._thread is not None:
            os.sched_setscheduler(self._thread, os.SCHED_BATCH, os.sched_param(0))

    def __exit__(self, *_: object) -> None:
        if self._thread is not None:
            os.sched_setscheduler(self._thread, os.SCHED_OTHER, os.sched_param(0))


def running() -> frozenset[threading.Thread]:
    """The threads that there are."""
    return frozenset(threading.enumerate())
