"""A worker finds its router and stays with it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from baton import errors
from baton.rpc.net import Server, service
from baton.rpc.status import abort
from baton.v1 import worker_pb2 as wire
from baton.v1.worker_pb2_grpc import RegistryServicer, add_RegistryServicer_to_server
from baton.worker import registration
from baton.worker.registration import Membership
from tests.rpc.servers import start_server
from tests.rpc.waiting import until

WORKER = wire.ProcessId(name="w", incarnation="w-1", address="127.0.0.1:1")


REGISTERED: list[str] = []
"""The routers that have taken the worker, in order."""


class Registry(RegistryServicer):
    """A router's registry, as a script."""

    def __init__(self, incarnation: str = "r-1", lease_ms: int = 30) -> None:
        self.router = wire.ProcessId(name="r", incarnation=incarnation, address="here")
        self.lease_ms = lease_ms
        self.calls: list[str] = []
        self.errors: list[errors.BatonError] = []
        self.forgotten = False
        self.hang = False

    async def Register(self, request: wire.RegisterRequest, context: Any) -> wire.RegisterResponse:
        self.calls.append("register")
        if self.hang:
            await asyncio.Event().wait()
        if self.errors:
            await abort(context, self.errors.pop(0))
        assert request.worker == WORKER
        self.forgotten = False
        REGISTERED.append(self.router.incarnation)
        return wire.RegisterResponse(router=self.router, lease_ms=self.lease_ms)

    async def Renew(self, request: wire.RenewRequest, context: Any) -> wire.RenewResponse:
        self.calls.append("renew")
        if self.forgotten:
            await abort(context, errors.NotFound("who?"))
        return wire.RenewResponse(router=self.router, lease_ms=self.lease_ms)

    async def Deregister(self, request: wire.DeregisterRequest, context: Any) -> wire.DeregisterResponse:
        self.calls.append("deregister")
        return wire.DeregisterResponse()


async def serve(registry: Registry, listen: str = "127.0.0.1:0") -> Server:
    return await start_server(listen, [service(add_RegistryServicer_to_server, registry, "Registry")])


class Joining:
    """A registration under way."""

    def __init__(self, address: str) -> None:
        REGISTERED.clear()
        self.routers = REGISTERED
        self.stop = asyncio.Event()
        made = Membership(address, wire.RegisterRequest(worker=WORKER))
        self.task = asyncio.create_task(made.run(self.stop))


@asynccontextmanager
async def joining(address: str) -> AsyncIterator[Joining]:
    """Stopped in order at the end."""
    worker = Joining(address)
    try:
        yield worker
    finally:
        worker.stop.set()
        async with asyncio.timeout(20):
            await asyncio.gather(worker.task, return_exceptions=True)


async def free_address() -> str:
    server = await start_server("127.0.0.1:0", [])
    await server.stop(0)
    return server.address


async def test_joins_renews_and_leaves() -> None:
    registry = Registry()
    server = await serve(registry)
    async with joining(server.address) as worker:
        await until(lambda: registry.calls.count("renew") >= 3, "renewals")
        assert worker.routers == ["r-1"]
    await server.stop(0)
    assert registry.calls.count("register") == 1
    assert registry.calls[-1] == "deregister"


async def test_waits_for_a_router_that_is_not_up_yet() -> None:
    address = await free_address()
    async with joining(address) as worker:
        await asyncio.sleep(0.15)  # it has failed at least once
        assert worker.routers == []
        registry = Registry()
        server = await serve(registry, address)
        await until(lambda: worker.routers, "registered")
    await server.stop(0)


async def test_stops_while_the_router_is_not_up() -> None:
    worker = Joining(await free_address())
    await asyncio.sleep(0.05)
    worker.stop.set()
    async with asyncio.timeout(10):
        await worker.task


async def test_forgotten_registers_again() -> None:
    registry = Registry()
    server = await serve(registry)
    async with joining(server.address) as worker:
        await until(lambda: worker.routers, "registered")
        registry.forgotten = True
        await until(lambda: len(worker.routers) == 2, "registered again")
    await server.stop(0)


async def test_a_router_that_restarted() -> None:
    registry = Registry()
    server = await serve(registry)
    async with joining(server.address) as worker:
        await until(lambda: worker.routers, "registered")
        await server.stop(0)
        server = await serve(Registry("r-2"), server.address)
        await until(lambda: worker.routers == ["r-1", "r-2"], "registered with the new one")
    await server.stop(0)


async def test_a_router_that_stops_in_the_middle_of_a_call() -> None:
    registry = Registry()
    registry.hang = True
    server = await serve(registry)
    async with joining(server.address) as worker:
        await until(lambda: registry.calls, "the call")
        await server.stop(0)
        server = await serve(Registry("r-2"), server.address)
        await until(lambda: worker.routers == ["r-2"], "registered with the new one")
    await server.stop(0)


@pytest.mark.parametrize(
    "error", [errors.Unavailable("not ready"), errors.DeadlineExceeded("slow"), errors.Cancelled("going down")]
)
async def test_tries_again(error: errors.BatonError) -> None:
    registry = Registry()
    registry.errors = [error, error]
    server = await serve(registry)
    async with joining(server.address) as worker:
        await until(lambda: worker.routers, "registered")
    await server.stop(0)
    assert registry.calls.count("register") == 3


async def test_a_router_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registration, "CALL_TIMEOUT_S", 0.05)
    registry = Registry()
    registry.hang = True
    server = await serve(registry)
    async with joining(server.address) as worker:
        await until(lambda: len(registry.calls) >= 2, "a second call")
        registry.hang = False
        await until(lambda: worker.routers, "registered")
    await server.stop(0)


@pytest.mark.parametrize("error", [errors.Mismatch("fingerprint", "a", "b"), errors.InvalidArgument("worker", "no")])
async def test_a_refusal_is_final(error: errors.BatonError) -> None:
    registry = Registry()
    registry.errors = [error]
    server = await serve(registry)
    worker = Joining(server.address)
    with pytest.raises(type(error)) as caught:
        await worker.task
    assert str(caught.value) == str(error)
    await server.stop(0)
