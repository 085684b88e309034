"""Workers join, stay, and go: leases, incarnations, models that differ, artifacts; and the router's start and end."""

from __future__ import annotations

import asyncio
import socket
from dataclasses import replace
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from baton.config import RouterConfig
from baton.errors import ConfigError, InvalidArgument, Mismatch, NotFound
from baton.rpc import net
from baton.rpc.convert import process_to_wire
from baton.rpc.status import call
from baton.spec import ProcessRef
from baton.v1 import admin_pb2 as admin
from baton.v1 import generation_pb2 as gen
from baton.v1 import worker_pb2 as wire
from baton.v1.worker_pb2_grpc import RegistryStub
from router.app import run
from tests.router.conftest import Cluster, ids_of
from tests.router.doubles import WAIT_S, WorkerDouble, card

OTHER_LAYOUT = wire.KvLayout(version=1, block_tokens=16, layers=2, kv_heads=1, head_dim=8, dtype="bfloat16", ranks=1)


async def registry(cluster: Cluster, method: str, request: Any) -> Any:
    """Calls the registry as a worker does; raises our errors."""
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

    async def test_who_does_not_renew_is_lost_and_who_does_stays(self, cluster: Cluster) -> None:
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


async def test_who_serves_at_the_old_ones_address_is_its_successor(cluster: Cluster) -> None:
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


@pytest.mark.parametrize(
    ("changes", "field", "values"),
    [
        ({"fingerprint": "e" * 32}, "model.fingerprint", ("f" * 32, "e" * 32)),
        ({"context_tokens": 7}, "model.context_tokens", ("65536", "7")),
        ({"tokenizer_sha256": "0" * 64}, "model.tokenizer_sha256", ("", "0" * 64)),
        ({"eos_token_ids": [5]}, "model.eos_token_ids", ("[2]", "[5]")),
        ({"kv_layout": OTHER_LAYOUT}, "model.kv_layout.dtype", ("float32", "bfloat16")),
    ],
)
async def test_another_model_under_the_same_name_is_refused(
    cluster: Cluster, changes: dict[str, Any], field: str, values: tuple[str, str]
) -> None:
    request = registration(ProcessRef("d1", "1", "127.0.0.1:9"), model=card(**changes))
    with pytest.raises(Mismatch) as caught:
        await registry(cluster, "Register", request)
    assert caught.value.field == field
    assert all(value in str(caught.value) for value in values)
    assert len(cluster.router.registry.workers()) == 2


async def test_models_of_different_names_live_side_by_side(cluster: Cluster) -> None:
    other = card(name="other", fingerprint="e" * 32)
    await cluster.add("p1", "prefill", card=other)
    await cluster.add("d1", "decode", card=other)
    for model, worker in (("tiny", "d0"), ("other", "d1")):
        events = await cluster.generate(model=model)
        assert (events[0].accepted.model, events[-1].finished.timeline.decode_worker) == (model, worker)
    with pytest.raises(grpc.aio.AioRpcError, match="one of other, tiny"):
        await cluster.generate()


async def test_a_model_is_forgotten_with_its_last_worker(empty: Cluster) -> None:
    first = await empty.add("p0", "prefill")
    await registry(empty, "Deregister", wire.DeregisterRequest(worker=process_to_wire(first.process)))
    assert not empty.router.registry.models
    await empty.add("p1", "prefill", card=card(fingerprint="e" * 32))
    (model,) = (await empty.generation.ListModels(gen.ListModelsRequest(), timeout=WAIT_S)).models
    assert model.fingerprint == "e" * 32


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"roles": []}, "roles"),
        ({"roles": [7]}, "roles[0]"),
        ({"worker": wire.ProcessId(name="x", incarnation="1", address="nowhere")}, "worker.address"),
        ({"worker": wire.ProcessId(incarnation="1", address="a:1")}, "worker.name"),
        ({"worker": wire.ProcessId(name="x", address="a:1")}, "worker.incarnation"),
        ({"capacity": wire.Capacity(max_sequences=1)}, "capacity.blocks"),
        ({"capacity": wire.Capacity(blocks=1)}, "capacity.max_sequences"),
        ({"model": card(name="")}, "model.name"),
        ({"model": card(tokenizer_sha256="xyz")}, "model.tokenizer_sha256"),
        ({"model": card(kv_layout=wire.KvLayout())}, "model.kv_layout.block_tokens"),
    ],
)
async def test_registrations_that_make_no_sense_name_the_field(
    empty: Cluster, changes: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidArgument) as caught:
        await registry(empty, "Register", registration(ProcessRef("p9", "1", "127.0.0.1:9"), **changes))
    assert caught.value.field == field
    assert not empty.router.registry.workers()


@pytest.mark.parametrize("damage", [b"", b"other bytes"])
async def test_an_artifact_with_another_checksum_is_refused(empty: Cluster, damage: bytes) -> None:
    worker = WorkerDouble("p0", "prefill", empty.output)
    worker.files = dict.fromkeys(worker.files, damage)
    await worker.start()
    empty.workers["p0"] = worker
    await worker.register(empty.router.process.address)
    await empty.until(lambda: not empty.router.registry.workers())
    worker.files = WorkerDouble("x", "prefill", empty.output).files
    await worker.join(empty.router.process.address)
    await empty.until(lambda: empty.usable("p0"))


async def test_who_cannot_be_reached_is_lost_at_once(empty: Cluster) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        await registry(empty, "Register", registration(ProcessRef("p9", "1", address)))
        started = asyncio.get_running_loop().time()
        await empty.until(lambda: not empty.router.registry.workers())
    assert asyncio.get_running_loop().time() - started < 1.5


async def health(cluster: Cluster, name: str) -> int:
    request = health_pb2.HealthCheckRequest(service=name)
    answer = await health_pb2_grpc.HealthStub(cluster.channel).Check(request, timeout=WAIT_S)
    return int(answer.status)


async def test_alive_at_once_and_ready_with_both_roles(empty: Cluster) -> None:
    async def ready() -> bool:
        return await health(empty, "readiness") == 1

    async def becomes(wanted: bool) -> None:
        async with asyncio.timeout(WAIT_S):
            while await ready() != wanted:
                continue

    assert await health(empty, "liveness") == 1
    await empty.add("p0", "prefill")
    assert not await ready()
    await empty.add("d0", "decode")
    await becomes(True)
    assert await health(empty, "baton.v1.Generation") == 1
    await empty.decode.stop()
    await becomes(False)


async def test_run_serves_until_told_to_stop_and_frees_everything() -> None:
    stop, address = asyncio.Event(), asyncio.get_running_loop().create_future()
    running = asyncio.create_task(run(RouterConfig(listen="127.0.0.1:0"), on_ready=address.set_result, stop=stop))
    where = await address
    worker = WorkerDouble("p0", "prefill", lambda spec: [5])
    await worker.start()
    await worker.join(where)
    stop.set()
    async with asyncio.timeout(WAIT_S):
        await running
    assert not await net.listens(where)
    await worker.stop()


async def test_a_stopping_router_ends_streams_and_the_workers_free(cluster: Cluster) -> None:
    cluster.decode.gate("step 1")
    stream = cluster.call()
    await cluster.decode.at("step 1")
    stopping = asyncio.create_task(cluster.router.stop())
    with pytest.raises(grpc.aio.AioRpcError, match="shutting down") as caught:
        async for _ in stream:
            pass
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    await stopping
    assert cluster.decode.cancelled == cluster.decode.attempts
    assert not any(cluster.router.requests.live().values())


async def test_an_occupied_port_is_one_clear_line() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ConfigError, match=f"cannot listen on {address}") as caught:
            await run(RouterConfig(listen=address), on_ready=lambda _: None, stop=asyncio.Event())
    assert "\n" not in str(caught.value)
