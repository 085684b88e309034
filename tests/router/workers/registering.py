"""Calls of the registry as a worker makes them."""

from __future__ import annotations

from typing import Any

from baton.rpc.convert import process_to_wire
from baton.rpc.status import call
from baton.spec import ProcessRef
from baton.v1 import worker_pb2 as wire
from baton.v1.worker_pb2_grpc import RegistryStub
from tests.router.conftest import Cluster
from tests.router.doubles import WAIT_S
from tests.router.tiny_model import card


async def registry(cluster: Cluster, method: str, request: Any) -> Any:
    """Raises our errors."""
    return await call(getattr(RegistryStub(cluster.channel), method)(request), WAIT_S)


def registration(process: ProcessRef, **changes: Any) -> wire.RegisterRequest:
    fields: dict[str, Any] = {
        "worker": process_to_wire(process),
        "roles": [wire.ROLE_PREFILL],
        "model": card(),
        "capacity": wire.Capacity(blocks=10, max_sequences=2),
        "transports": ["tcp"],
    }
    return wire.RegisterRequest(**(fields | changes))
