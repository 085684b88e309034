"""The models that workers bring: registrations that are refused, models that differ, artifacts."""

from __future__ import annotations

from typing import Any

import grpc
import pytest

from baton.errors import InvalidArgument, Mismatch
from baton.rpc.convert import process_to_wire
from baton.spec import ProcessRef
from baton.v1 import generation_pb2 as gen
from baton.v1 import worker_pb2 as wire
from tests.router.conftest import Cluster
from tests.router.doubles import WAIT_S, WorkerDouble
from tests.router.tiny_model import card
from tests.router.workers.registering import registration, registry

OTHER_LAYOUT = wire.KvLayout(version=1, block_tokens=16, layers=2, kv_heads=1, head_dim=8, dtype="bfloat16", ranks=1)


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
