"""A worker service to which routers attach."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from baton.rpc.net import open_channel, service
from baton.spec import ProcessRef
from baton.telemetry import Counts
from baton.v1.worker_pb2_grpc import add_WorkerServicer_to_server
from baton.worker import service as worker_service
from baton.worker.service import WorkerService
from tests.rpc.servers import start_server
from tests.worker.attached import ARTIFACTS, Bench, Handler


@pytest.fixture
async def bench(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Bench]:
    monkeypatch.setattr(worker_service, "GRACE_S", 30.0)
    worker = WorkerService(ProcessRef("w", "w-1", "here"), ARTIFACTS, Counts())
    handler = Handler()
    worker.add_handler(handler)
    server = await start_server("127.0.0.1:0", [service(add_WorkerServicer_to_server, worker, "Worker")])
    async with open_channel(server.address) as channel:
        yield Bench(server, worker, handler, channel)
    worker.close()
    await server.stop(0)
