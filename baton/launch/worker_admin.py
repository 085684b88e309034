"""The Admin service of a worker: its pool and counts, and whether its books balance."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from baton import errors
from baton.config import RoleName
from baton.rpc.convert import ROLES, process_to_wire
from baton.rpc.status import abort
from baton.spec import ProcessRef
from baton.telemetry import Counts, resident_bytes
from baton.v1 import admin_pb2 as wire
from baton.v1.admin_pb2_grpc import AdminServicer
from baton.worker.sending.senders import Senders
from kvtransfer.blocks.pool import BlockPool, PoolCorrupt


class Sizes(NamedTuple):
    """Bytes that a worker allocates at start and keeps."""

    pool: int
    weights: int


class WorkerAdmin(AdminServicer):
    def __init__(
        self,
        process: ProcessRef,
        roles: Iterable[RoleName],
        pool: BlockPool,
        sizes: Sizes,
        live: Callable[[], dict[str, int]],
        check_books: Callable[[], None],
        counts: Counts,
        senders: Senders | None = None,
    ) -> None:
        """`check_books` raises PoolCorrupt where the pool and the ledgers over it do not add up; only a prefill worker
        has `senders`."""
        self._process, self._roles, self._pool, self._live, self._counts = process, roles, pool, live, counts
        self._sizes, self._check_books, self._senders = sizes, check_books, senders

    async def ListWorkers(self, request: wire.ListWorkersRequest, context: Any) -> wire.ListWorkersResponse:
        await abort(context, errors.Unimplemented("", "ask the router for its workers"))

    async def Explain(self, request: wire.ExplainRequest, context: Any) -> wire.ExplainResponse:
        await abort(context, errors.Unimplemented("", "ask the router why a request went where it did"))

    async def GetStatus(self, request: wire.GetStatusRequest, context: Any) -> wire.GetStatusResponse:
        statistics = self._pool.statistics()
        live = self._live() | {"tasks": len(asyncio.all_tasks()), "threads": threading.active_count()}
        return wire.GetStatusResponse(
            process=process_to_wire(self._process),
            roles=[ROLES[name] for name in sorted(self._roles)],
            pool=wire.PoolStatus(
                blocks=statistics.total,
                free=statistics.free,
                held=statistics.held,
                cached=statistics.cached,
                quarantined=statistics.quarantined,
                integrity_error=_integrity_error(self._check_books),
                bytes=self._sizes.pool,
            ),
            weight_bytes=self._sizes.weights,
            live=live,
            counters=self._counts.snapshot(),
            resident_bytes=resident_bytes(),
            pairs=[
                wire.Pair(
                    peer=process_to_wire(sender.peer),
                    transport=sender.transport,
                    handoffs=sender.handoffs,
                    note=sender.note,
                )
                for sender in ([] if self._senders is None else self._senders.connected())
            ],
        )


def _integrity_error(check_books: Callable[[], None]) -> str:
    try:
        check_books()
    except PoolCorrupt as error:
        return str(error)
    return ""
