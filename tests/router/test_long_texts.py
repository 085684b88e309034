"""Whatever a client or a worker sends where a name is expected, it gets the right status, which is small."""

from __future__ import annotations

from typing import Any

import grpc
import pytest

from baton.client import Client
from baton.errors import InvalidArgument
from baton.identity import mint_process
from baton.rpc.convert import process_to_wire
from baton.v1 import admin_pb2 as admin
from baton.v1 import generation_pb2 as gen
from baton.v1 import worker_pb2 as wire
from baton.v1.worker_pb2_grpc import RegistryStub
from tests.router.conftest import Cluster
from tests.router.doubles import WAIT_S
from tests.router.tiny_model import card
from tests.router.workers.registering import registration
from tests.texts import ALPHABETS, LONG_TEXTS, assert_small, text_of


def requests(text: str) -> list[tuple[str, Any, str]]:
    """(method, request, the field that is wrong), for every text that an error may repeat."""
    chat, stopping = gen.Chat(messages=[gen.ChatMessage(role=text, content="x")]), gen.Stopping(stop=[text])
    mine = process_to_wire(mint_process("worker", "127.0.0.1:1", "stranger"))
    found: list[tuple[str, Any, str]] = [
        ("Generation/Generate", gen.GenerateRequest(prompt="x", model=text), "model"),
        ("Generation/Generate", gen.GenerateRequest(prompt="x", request_id=text), "request_id"),
        ("Generation/Generate", gen.GenerateRequest(prompt="x", tenant_salt=text), "tenant_salt"),
        ("Generation/Generate", gen.GenerateRequest(chat=chat), "chat.messages[0].role"),
        ("Generation/Generate", gen.GenerateRequest(prompt="x", stopping=stopping), "stopping.stop[0]"),
        ("Generation/Tokenize", gen.TokenizeRequest(prompt="x", model=text), "model"),
        ("Generation/Tokenize", gen.TokenizeRequest(chat=chat), "chat.messages[0].role"),
        ("Admin/Explain", admin.ExplainRequest(request_id=text), "request_id"),
        ("Admin/Explain", admin.ExplainRequest(request_id="x", tenant_salt=text), "tenant_salt"),
    ]
    for name in ("name", "incarnation", "address"):
        worker = wire.ProcessId(name=mine.name, incarnation=mine.incarnation, address=mine.address)
        setattr(worker, name, text)
        found.append(("Registry/Register", _registration(worker=worker), f"worker.{name}"))
    for name in ("name", "fingerprint", "bos_token", "eos_token", "tokenizer_sha256", "chat_template_sha256"):
        changed = card()
        setattr(changed, name, text)
        found.append(("Registry/Register", _registration(model=changed), f"model.{name}"))
    changed = card()
    changed.kv_layout.dtype = text
    found.append(("Registry/Register", _registration(model=changed), "model.kv_layout"))
    found.append(("Registry/Register", _registration(transports=["tcp", text]), "transports[1]"))
    return found


def _registration(**changes: Any) -> wire.RegisterRequest:
    return registration(mint_process("worker", "127.0.0.1:1", "stranger"), **changes)


async def failure(cluster: Cluster, method: str, request: Any) -> grpc.aio.AioRpcError:
    """How the call fails."""
    send: Any = cluster.channel.unary_unary(f"/baton.v1.{method}")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await send(request.SerializeToString(), timeout=WAIT_S)
    return caught.value


@pytest.mark.parametrize("text", LONG_TEXTS.values(), ids=LONG_TEXTS)
async def test_a_long_text_is_an_invalid_argument(cluster: Cluster, text: str) -> None:
    for method, request, field in requests(text):
        error = await failure(cluster, method, request)
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT, (method, field, error.details())
        assert (error.details() or "").startswith(f"{field}: ")
        assert_small(error)
    await cluster.idle()


@pytest.mark.parametrize("alphabet", ALPHABETS)
async def test_a_text_of_a_valid_length_is_shown_printable(cluster: Cluster, alphabet: str) -> None:
    """As unknown names, and as ids that another request has."""
    text = text_of(alphabet, 100)
    for request in (gen.GenerateRequest(prompt="x", model=text), gen.TokenizeRequest(prompt="x", model=text)):
        method = "Generate" if isinstance(request, gen.GenerateRequest) else "Tokenize"
        error = await failure(cluster, f"Generation/{method}", request)
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "is not served here" in (error.details() or "")
        assert_small(error)
    error = await failure(cluster, "Admin/Explain", admin.ExplainRequest(request_id=text, tenant_salt=text))
    assert error.code() is grpc.StatusCode.NOT_FOUND
    assert_small(error)
    with cluster.router.requests.slot("", text):
        error = await failure(cluster, "Generation/Generate", gen.GenerateRequest(prompt="x", request_id=text))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "is in progress already" in (error.details() or "")
    assert_small(error)


@pytest.mark.parametrize("text", LONG_TEXTS.values(), ids=LONG_TEXTS)
async def test_a_renewal_of_a_long_name_is_not_found(cluster: Cluster, text: str) -> None:
    stranger = wire.ProcessId(name=text, incarnation=text, address=text)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await RegistryStub(cluster.channel).Renew(wire.RenewRequest(worker=stranger), timeout=WAIT_S)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert_small(caught.value)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"transports": ["tcp"] * 100_000}, "transports"),
        ({"roles": [wire.ROLE_PREFILL] * 100_000}, "roles"),
        ({"model": card(eos_token_ids=range(100_000))}, "model.eos_token_ids"),
    ],
)
async def test_a_registration_of_many_parts_is_refused(cluster: Cluster, changes: dict[str, Any], field: str) -> None:
    error = await failure(cluster, "Registry/Register", _registration(**changes))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert (error.details() or "").startswith(f"{field}: at most ")


async def test_the_sdk_raises_what_the_router_said(cluster: Cluster) -> None:
    async with Client(cluster.router.process.address) as client:
        for text in LONG_TEXTS.values():
            with pytest.raises(InvalidArgument) as caught:
                await client.complete("x", model=text)
            assert caught.value.field == "model"
            assert len(str(caught.value)) < 100
