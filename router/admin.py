"""`baton.v1.Admin` on a router, the service for operators."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

from baton.errors import InvalidArgument, NotFound
from baton.rpc import awake
from baton.rpc.convert import ROLES, process_to_wire
from baton.rpc.frames import load_to_wire
from baton.rpc.status import abort
from baton.spec import ProcessRef
from baton.telemetry import Counts, resident_bytes
from baton.v1 import admin_pb2 as admin
from baton.v1 import worker_pb2 as wire
from baton.v1.admin_pb2_grpc import AdminServicer
from router.clients.validation import check_labels
from router.placement.explanations import Explanation
from router.placement.offers import Candidate
from router.requests.table import Requests
from router.workers.pools import missing
from router.workers.registry import Registry
from router.workers.worker import Worker


class AdminService(AdminServicer):
    def __init__(self, router: ProcessRef, registry: Registry, requests: Requests, counts: Counts) -> None:
        self._router, self._registry, self._requests, self._counts = router, registry, requests, counts

    async def ListWorkers(self, request: admin.ListWorkersRequest, context: Any) -> admin.ListWorkersResponse:
        """The workers that hold a lease, by name."""
        now = awake.now()
        workers = [_info(worker, now) for worker in self._registry.workers()]
        return admin.ListWorkersResponse(workers=workers, degraded=self._degraded())

    async def Explain(self, request: admin.ExplainRequest, context: Any) -> admin.ExplainResponse:
        try:
            check_labels(request.request_id, request.tenant_salt)
        except InvalidArgument as error:
            await abort(context, error)
        now = asyncio.get_running_loop().time()
        found = self._requests.placer.explanations.find(request.tenant_salt, request.request_id)
        if not found:
            await abort(context, NotFound(f"no request {request.request_id!r} is remembered here"))
        return admin.ExplainResponse(placements=[_placement(entry, now) for entry in found])

    async def GetStatus(self, request: admin.GetStatusRequest, context: Any) -> admin.GetStatusResponse:
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
            degraded=self._degraded(),
        )

    def _degraded(self) -> list[str]:
        path, models = self._requests.placer.path, self._registry.models
        return [line for _, model in sorted(models.items()) for line in missing(path, model).values()]


def _placement(found: Explanation, now: float) -> admin.Placement:
    candidates = [
        admin.Candidate(
            worker=candidate.name,
            way="" if candidate.way is None else candidate.way.value,
            **_same(candidate, "feasible", "note", "load"),
            **_times(candidate),
        )
        for candidate in found.candidates
    ]
    return admin.Placement(
        age_ms=(now - found.at) * 1e3,
        chosen=f"{found.chosen} ({found.way})" if found.way else found.chosen,
        candidates=candidates,
        **_same(found, "step", "reason", "meets", "constraint", "refused", "others"),
        **_times(found),
    )


def _same(value: object, *names: str) -> dict[str, Any]:
    """The fields that have the same name on the wire."""
    return {name: getattr(value, name) for name in names}


def _times(found: Explanation | Candidate) -> dict[str, Any]:
    """In milliseconds, where they were predicted."""
    seconds = {"ttft_ms": found.ttft_s, "tpot_ms": found.tpot_s}
    return {name: value * 1e3 for name, value in seconds.items() if value is not None}


def _info(worker: Worker, now: float) -> admin.WorkerInfo:
    given, predictions = worker.registration, _same(worker.accuracy, "promised", "kept", "error", "factor")
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
        predictions=None if worker.accuracy.error is None else admin.Predictions(**predictions),
        handoff_ms=worker.handoffs.expected_s * 1e3 if len(worker.handoffs) else None,
    )
