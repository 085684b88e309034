"""Load reports: soon after a change, but no more often than a router can use."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

from baton.cost import CostModel
from baton.messages import LoadReport
from baton.worker.service import WorkerService
from kvtransfer.blocks.pool import BlockPool

INTERVAL_S = 0.05


class LoadReporter:
    """Sends one report to every attached router after a change; changes within `INTERVAL_S` share one."""

    def __init__(
        self,
        worker: WorkerService,
        pool: BlockPool,
        model: CostModel,
        chunk_tokens: int,
        report: Callable[[], LoadReport],
    ) -> None:
        """`report` has the role's queue and sequences; the pool's counts and the costs are added to it."""
        self._worker, self._pool, self._model, self._chunk_tokens = worker, pool, model, chunk_tokens
        self._report = report
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False
        worker.on_attach.append(lambda session: session.send(self._whole()))

    def changed(self) -> None:
        """To be called when something by which a router places has changed."""
        if self._timer is None and not self._closed:
            self._timer = asyncio.get_running_loop().call_later(INTERVAL_S, self._flush)

    def close(self) -> None:
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()

    def _flush(self) -> None:
        self._timer = None
        report = self._whole()
        for session in self._worker.sessions:
            session.send(report)

    def _whole(self) -> LoadReport:
        pool, cost = self._pool.statistics(), self._model.cost
        return replace(
            self._report(),
            free_blocks=pool.free,
            cached_blocks=pool.cached,
            held_blocks=pool.held,
            quarantined_blocks=pool.quarantined,
            cost=cost if cost.knows_prefill or cost.knows_decode else None,
            cost_error=self._model.error,
            chunk_tokens=self._chunk_tokens,
        )
