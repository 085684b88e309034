"""Requests whose bytes are no message."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from baton.rpc.net import open_channel, service
from baton.v1 import worker_pb2 as wire
from baton.v1.worker_pb2_grpc import add_RegistryServicer_to_server as add_registry
from baton.v1.worker_pb2_grpc import add_WorkerServicer_to_server as add_worker
from tests.rpc.servers import start_server


class Registry:
    async def Register(self, request: Any, context: Any) -> None: ...
    async def Deregister(self, request: Any, context: Any) -> None: ...

    async def Renew(self, request: wire.RenewRequest, context: Any) -> wire.RenewResponse:
        return wire.RenewResponse(lease_ms=len(request.worker.name))


class Worker:
    async def Attach(self, request: Any, context: Any) -> None: ...

    async def FetchArtifact(
        self, request: wire.FetchArtifactRequest, context: Any
    ) -> AsyncIterator[wire.FetchArtifactResponse]:
        yield wire.FetchArtifactResponse(data=request.sha256.encode())


async def outcome(channel: Any, method: str, data: bytes, streams: bool) -> Any:
    """The answer's bytes, or the status code."""
    call: Any = (channel.unary_stream if streams else channel.unary_unary)(f"/{method}")(data, timeout=5)
    try:
        return b"".join([part async for part in call]) if streams else await call
    except grpc.aio.AioRpcError as error:
        return error.code()


@pytest.mark.parametrize("data", [b"\xff", b"\x0a\x05abc", b"\x0a\x02\xff\x7f", b"\x0a\x01\xff"])
@pytest.mark.parametrize(
    ("method", "streams"),
    [("Registry/Renew", False), ("Worker/FetchArtifact", True), ("grpc.health.v1.Health/Check", False)],
)
async def test_they_are_an_invalid_argument_in_every_service(method: str, streams: bool, data: bytes) -> None:
    services = [service(add_registry, Registry(), "Registry"), service(add_worker, Worker(), "Worker")]
    server = await start_server("127.0.0.1:0", services)
    try:
        async with open_channel(server.address) as channel:
            path = method if method.startswith("grpc") else f"baton.v1.{method}"
            assert await outcome(channel, path, data, streams) is grpc.StatusCode.INVALID_ARGUMENT
            renewal = wire.RenewRequest(worker=wire.ProcessId(name="abc")).SerializeToString()
            answer = await outcome(channel, "baton.v1.Registry/Renew", renewal, streams=False)
            assert wire.RenewResponse.FromString(answer).lease_ms == 3
            fetch = wire.FetchArtifactRequest(sha256="ab").SerializeToString()
            answer = await outcome(channel, "baton.v1.Worker/FetchArtifact", fetch, streams=True)
            assert wire.FetchArtifactResponse.FromString(answer).data == b"ab"
    finally:
        await server.stop(0)
