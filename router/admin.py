"""What operators call: `baton.v1.Admin` on a router."""

from __future__ import annotations

import asyncio
import os
import threading
from pathlib import Path
from typing import Any

from baton.errors import NotFound
from baton.rpc.convert import ROLES, process_to_wire
from baton.rpc.frames import load_to_wire
from baton.rpc.status import abort
from baton.spec import ProcessRef
from baton.telemetry import Counts
from baton.v1 import admin_pb2 as admin
from baton.v1 import worker_pb2 as wire
from baton.v1.admin_pb2_grpc import AdminServicer
from router.placement.accuracy import Accuracy
from router.placement.explanations import Explanation, Explanations
from router.requests.table import Requests
from router.workers.registry import Registry
from router.workers.worker import Worker


class AdminService(AdminServicer):
    """The workers there are, and what this router holds."""

    def __init__(
        self,
        router: ProcessRef,
        registry: Registry,
        requests: Requests,
        counts: Counts,
        explanations: Explanations,
    ) -> None:
        self._router, self._registry, self._requests, self._counts = router, registry, requests, counts
        self._explanations = explanations

    async def ListWorkers(self, request: admin.ListWorkersRequest, context: Any) -> admin.ListWorkersResponse:
        """All that hold a lease, by name."""
        now = asyncio.get_running_loop().time()
        return admin.ListWorkersResponse(workers=[_info(worker, now) for worker in self._registry.workers()])

    async def Explain(self, request: admin.ExplainRequest, context: Any) -> admin.ExplainResponse:
        now = asyncio.get_running_loop().time()
        found = self._explanations.find(request.tenant_salt, request.request_id)
        if not found:
            await abort(context, NotFound(f"no request {request.request_id!r} is remembered here"))
        return admin.ExplainResponse(placements=[_placement(entry, now) for entry in found])

    async def GetStatus(self, request: admin.GetStatusRequest, context: Any) -> admin.GetStatusResponse:
        """Live objects, counts since start, memory."""
        workers = self._registry.workers()
        live = self._requests.live() | {
            "workers": len(workers),
            "sessions": sum(worker.link.attached for worker in workers),
            "models": len(self._registry.models),
            "prefix_blocks": len(self._requests.placer.prefixes),
            "tasks": len(asyncio.all_tasks()),
            "threads": threading.active_count(),
        }
        return admin.GetStatusResponse(
            process=process_to_wire(self._router),
            live=live,
            counters=self._counts.snapshot(),
            resident_bytes=resident_bytes(),
        )


def resident_bytes() -> int:
    """Memory of this process that is in RAM."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _placement(found: Explanation, now: float) -> admin.Placement:
    return admin.Placement(
        step=found.step,
        age_ms=(now - found.at) * 1e3,
        chosen=f"{found.chosen} ({found.way})" if found.way else found.chosen,
        reason=found.reason,
        meets=found.meets,
        constraint=found.constraint,
        refused=found.refused,
        ttft_ms=_ms(found.ttft_s),
        tpot_ms=_ms(found.tpot_s),
        others=found.others,
        candidates=[
            admin.Candidate(
                worker=candidate.name,
                way="" if candidate.way is None else candidate.way.value,
                feasible=candidate.feasible,
                note=candidate.note,
                ttft_ms=_ms(candidate.ttft_s),
                tpot_ms=_ms(candidate.tpot_s),
                load=candidate.load,
            )
            for candidate in found.candidates
        ],
    )


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1e3


def _info(worker: Worker, now: float) -> admin.WorkerInfo:
    given = worker.registration
    return admin.WorkerInfo(
        process=process_to_wire(given.process),
        roles=[ROLES[role] for role in sorted(given.roles, reverse=True)],
        model=given.card.name,
        capacity=wire.Capacity(blocks=given.blocks, max_sequences=given.max_sequences),
        transports=given.transports,
        attached=worker.link.attached,
        lease_left_ms=max(0.0, worker.lease_until - now) * 1e3,
        load=None if worker.load is None else load_to_wire(worker.load),
        attempts=len(worker.prefill) + len(worker.decode),
        predictions=_predictions(worker.accuracy),
        handoff_ms=worker.handoffs.expected_s * 1e3 if len(worker.handoffs) else None,
    )


def _predictions(found: Accuracy) -> admin.Predictions | None:
    if found.error is None:
        return None
    return admin.Predictions(promised=found.promised, kept=found.kept, error=found.error, factor=found.factor)
