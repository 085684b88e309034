"""Workers join, stay, and go: leases, names, incarnations."""

from __future__ import annotations

import asyncio
import socket
from dataclasses import replace

import grpc
import pytest

from baton.config import RouterConfig
from baton.errors import InvalidArgument, NotFound
from baton.rpc.convert import process_to_wire
from baton.spec import ProcessRef
from baton.v1 import admin_pb2 as admin
from baton.v1 import worker_pb2 as wire
from tests.router.conftest import Cluster, ids_of
from tests.router.doubles import WAIT_S, WorkerDouble
from tests.router.workers.registering import registration, registry


async def test_workers_are_listed_with_what_they_said(cluster: Cluster) -> None:
    load = wire.LoadReport(free_blocks=7, waiting=1)
    cluster.decode.says(load=load)
    listed: list[admin.WorkerInfo] = []

    async def look() -> None:
        answer = await cluster.admin.ListWorkers(admin.ListWorkersRequest(), timeout=WAIT_S)
        listed[:] = answer.workers

    async with asyncio.timeout(WAIT_S):
        while not listed or not listed[0].HasField("load"):
            await look()
    decode, prefill = listed
    assert (decode.process.name, prefill.process.name) == ("d0", "p0")
    assert list(decode.roles) == [wire.ROLE_DECODE]
    assert (decode.model, decode.capacity.blocks, list(decode.transports)) == ("tiny", 8192, ["memory"])
    assert (decode.attached, decode.load, decode.attempts) == (True, load, 0)
    assert 0 < decode.lease_left_ms <= 6000


class TestLeases:
    @pytest.fixture
    def config(self) -> RouterConfig:
        return RouterConfig(listen="127.0.0.1:0", lease_s=1.0)

    async def test_a_worker_that_does_not_renew_is_lost_and_one_that_does_stays(self, cluster: Cluster) -> None:
        cluster.decode.gate("step 1")
        stream = cluster.call()
        await cluster.decode.at("step 1")
        request = wire.RenewRequest(worker=process_to_wire(cluster.prefill.process))
        answer = wire.RenewResponse()
        async with asyncio.timeout(WAIT_S):
            while len(cluster.router.registry.workers()) == 2:
                answer = await registry(cluster, "Renew", request)
                await asyncio.sleep(0.1)
        assert answer.lease_ms == 1000
        assert answer.router.incarnation == cluster.router.process.incarnation
        assert [worker.name for worker in cluster.router.registry.workers()] == ["p0"]
        with pytest.raises(grpc.aio.AioRpcError, match="lease"):
            async for _ in stream:
                pass

    async def test_renewals_in_any_order_end_in_the_order_of_their_ends(self, cluster: Cluster) -> None:
        third = await cluster.add("d1", "decode")
        for worker in (third, cluster.prefill, cluster.decode):
            await asyncio.sleep(0.1)
            await registry(cluster, "Renew", wire.RenewRequest(worker=process_to_wire(worker.process)))
        await cluster.until(lambda: len(cluster.router.registry.workers()) == 2)
        assert not any(worker.name == "d1" for worker in cluster.router.registry.workers())
        await cluster.until(lambda: not cluster.router.registry.workers())
        assert not cluster.router.registry.models


async def test_only_the_holder_of_a_lease_can_renew_it(cluster: Cluster) -> None:
    for process in (replace(cluster.prefill.process, incarnation="older"), ProcessRef("nobody", "1", "127.0.0.1:1")):
        with pytest.raises(NotFound):
            await registry(cluster, "Renew", wire.RenewRequest(worker=process_to_wire(process)))


async def test_leaving_is_idempotent_and_only_for_oneself(cluster: Cluster) -> None:
    stranger = replace(cluster.prefill.process, incarnation="older")
    await registry(cluster, "Deregister", wire.DeregisterRequest(worker=process_to_wire(stranger)))
    assert cluster.usable("p0")
    for _ in range(2):
        await registry(cluster, "Deregister", wire.DeregisterRequest(worker=process_to_wire(cluster.prefill.process)))
    assert not cluster.usable("p0")


async def test_registering_again_confirms(cluster: Cluster) -> None:
    before = cluster.router.registry.by_name("d0")
    await cluster.decode.join(cluster.router.process.address)
    assert cluster.router.registry.by_name("d0") is before


async def another_d0(cluster: Cluster) -> WorkerDouble:
    """A second process under the name of the first, not registered yet."""
    made = WorkerDouble("d0", "decode", cluster.output)
    await made.start()
    made.process = replace(made.process, incarnation="d0-2")
    return made


async def test_a_second_worker_of_a_live_ones_name_is_refused(cluster: Cluster) -> None:
    first = cluster.router.registry.by_name("d0")
    second = await another_d0(cluster)
    with pytest.raises(InvalidArgument, match="'d0' is the name of a live worker at") as caught:
        await registry(cluster, "Register", registration(second.process, roles=[wire.ROLE_DECODE]))
    assert caught.value.field == "worker.name"
    assert cluster.router.registry.by_name("d0") is first
    assert ids_of(await cluster.generate()) == cluster.answer
    await second.stop()


async def test_the_name_is_free_once_its_process_is_gone_though_its_stream_seems_up(cluster: Cluster) -> None:
    """The address refuses connections before the router has noticed that the stream is broken."""
    first, second = cluster.router.registry.by_name("d0"), await another_d0(cluster)
    await cluster.decode.stop()
    first.link.attached = True
    await second.join(cluster.router.process.address)
    assert first.lost
    cluster.workers["d0"] = second
    assert ids_of(await cluster.generate()) == cluster.answer


async def test_the_process_at_the_old_ones_address_is_its_successor(cluster: Cluster) -> None:
    link = cluster.router.registry.by_name("d0").link
    await cluster.decode.stop()
    link.attached = True  # unless the router has found out by itself, which is as good
    successor = replace(cluster.decode.process, incarnation="d0-2")
    await registry(cluster, "Register", registration(successor, roles=[wire.ROLE_DECODE]))


async def test_a_new_incarnation_voids_what_the_old_one_held(cluster: Cluster) -> None:
    cluster.decode.gate("step 1")
    stream = cluster.call()
    await cluster.decode.at("step 1")
    newer = await another_d0(cluster)
    await cluster.decode.stop()
    await newer.join(cluster.router.process.address)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in stream:
            pass
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    cluster.workers["d0"] = newer
    await cluster.until(lambda: cluster.usable("d0"))
    assert ids_of(await cluster.generate()) == cluster.answer


async def test_a_worker_that_cannot_be_reached_is_lost_at_once(empty: Cluster) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        await registry(empty, "Register", registration(ProcessRef("p9", "1", address)))
        started = asyncio.get_running_loop().time()
        await empty.until(lambda: not empty.router.registry.workers())
    assert asyncio.get_running_loop().time() - started < 1.5
