"""Load reports: at once when something changed, but no more often than the router can use."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from baton.v1 import worker_pb2 as wire
from baton.worker.service import WorkerService

INTERVAL_S = 0.05


class LoadReporter:
    """Sends one report to every attached router after a change; changes within `INTERVAL_S` share one."""

    def __init__(self, worker: WorkerService, report: Callable[[], wire.LoadReport]) -> None:
        self._worker = worker
        self._report = report
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False
        worker.on_attach.append(lambda session: session.send(load=report()))

    def changed(self) -> None:
        """Something that a router places by is different now."""
        if self._timer is None and not self._closed:
            self._timer = asyncio.get_running_loop().call_later(INTERVAL_S, self._flush)

    def close(self) -> None:
        """Sends nothing more."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()

    def _flush(self) -> None:
        self._timer = None
        report = self._report()
        for session in self._worker.sessions:
            session.send(load=report)
