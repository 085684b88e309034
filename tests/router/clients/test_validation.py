"""Every bad input of a client gets an answer that names its field."""

from __future__ import annotations

import math
from typing import Any

import grpc
import pytest

from baton.errors import InvalidArgument, Unimplemented
from baton.rpc.status import from_rpc_error
from baton.v1 import generation_pb2 as gen
from router.clients.parsing import REQUEST_LIMIT_BYTES, explain
from router.clients.validation import check_request
from router.clients.wire_scan import too_large
from tests.router.conftest import Cluster, ids_of
from tests.router.tiny_model import CONTEXT, tokenizer

VOCABULARY = tokenizer().get_vocab_size()


def sampling(**fields: Any) -> dict[str, Any]:
    return {"sampling": gen.Sampling(**fields)}


def stopping(**fields: Any) -> dict[str, Any]:
    return {"stopping": gen.Stopping(**fields)}


def chat(*messages: tuple[str, str]) -> gen.Chat:
    return gen.Chat(messages=[gen.ChatMessage(role=role, content=content) for role, content in messages])


BAD: list[tuple[dict[str, Any], str]] = [
    ({"prompt": ""}, "prompt"),
    ({"token_ids": gen.TokenIds()}, "token_ids.ids"),
    ({"chat": gen.Chat()}, "chat.messages"),
    ({"chat": chat(("user", "x"), ("wizard", "y"))}, "chat.messages[1].role"),
    ({"chat": chat(("user", "forbidden"))}, "chat"),
    ({"prompt": "x", "chat": chat(("user", "x"))}, "chat"),
    ({"prompt": "x", "token_ids": gen.TokenIds(ids=[3])}, "token_ids"),
    ({"token_ids": gen.TokenIds(ids=[3, 4, 5, VOCABULARY])}, "token_ids.ids[3]"),
    ({"token_ids": gen.TokenIds(ids=[2**32 - 1])}, "token_ids.ids[0]"),
    ({"token_ids": gen.TokenIds(ids=[3] * CONTEXT)}, "token_ids.ids"),
    ({"prompt": "x " * CONTEXT}, "prompt"),
    ({"model": "other"}, "model"),
    ({"model": "x" * 100_000}, "model"),
    ({"request_id": "x" * 129}, "request_id"),
    ({"tenant_salt": "é" * 65}, "tenant_salt"),
    (sampling(temperature=-0.1), "sampling.temperature"),
    (sampling(temperature=math.nan), "sampling.temperature"),
    (sampling(temperature=math.inf), "sampling.temperature"),
    (sampling(top_p=0), "sampling.top_p"),
    (sampling(top_p=1.01), "sampling.top_p"),
    (sampling(top_p=math.nan), "sampling.top_p"),
    (sampling(min_p=-0.1), "sampling.min_p"),
    (sampling(min_p=1.1), "sampling.min_p"),
    (sampling(repetition_penalty=0), "sampling.repetition_penalty"),
    (sampling(repetition_penalty=-math.inf), "sampling.repetition_penalty"),
    (sampling(presence_penalty=2.1), "sampling.presence_penalty"),
    (sampling(frequency_penalty=-2.1), "sampling.frequency_penalty"),
    (sampling(frequency_penalty=math.nan), "sampling.frequency_penalty"),
    (stopping(max_tokens=0), "stopping.max_tokens"),
    (stopping(max_tokens=2**32 - 1), "stopping.max_tokens"),
    (stopping(max_tokens=CONTEXT), "stopping.max_tokens"),
    (stopping(stop=["a", ""]), "stopping.stop[1]"),
    (stopping(stop=["é" * 129]), "stopping.stop[0]"),
    (stopping(stop=[str(number) for number in range(17)]), "stopping.stop"),
    (stopping(stop_token_ids=range(65)), "stopping.stop_token_ids"),
    (stopping(stop_token_ids=[1, VOCABULARY]), "stopping.stop_token_ids[1]"),
    ({"logprobs": 21}, "logprobs"),
    ({"priority": 101}, "priority"),
    ({"priority": -101}, "priority"),
    ({"slo": gen.Slo(ttft_ms=0)}, "slo.ttft_ms"),
    ({"slo": gen.Slo(tpot_ms=-1)}, "slo.tpot_ms"),
    ({"slo": gen.Slo(tpot_ms=math.nan)}, "slo.tpot_ms"),
    ({"slo": gen.Slo(ttft_ms=math.inf)}, "slo.ttft_ms"),
    ({"slo": gen.Slo(ttft_ms=5e-324)}, "slo.ttft_ms"),
    ({"slo": gen.Slo(tpot_ms=1.797e308)}, "slo.tpot_ms"),
    ({"when_unmet": 9}, "when_unmet"),
    ({"on_disconnect": 9}, "on_disconnect"),
]


@pytest.fixture(name="fail")
def _fail(cluster: Cluster) -> Any:
    async def fail(request: Any = None, *, raw: bytes | None = None, method: str = "Generate", **fields: Any) -> Any:
        """How a call with these fields, or these bytes, fails."""
        if raw is None:
            if not {"prompt", "token_ids", "chat"} & fields.keys():
                fields["prompt"] = "x"
            raw = gen.GenerateRequest(**fields).SerializeToString()
        send: Any = cluster.channel.unary_unary(f"/baton.v1.Generation/{method}")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await send(raw, timeout=10)
        return from_rpc_error(caught.value)

    return fail


@pytest.mark.parametrize(("fields", "field"), BAD, ids=[f"{number}-{field}" for number, (_, field) in enumerate(BAD)])
async def test_bad_input_is_refused_with_the_fields_name(
    cluster: Cluster, fail: Any, fields: dict[str, Any], field: str
) -> None:
    error = await fail(**fields)
    assert isinstance(error, InvalidArgument), error
    assert error.field == field
    assert str(error).startswith(f"{field}: ")
    assert not cluster.prefill.attempts
    await cluster.idle()


async def test_all_of_them_leave_the_router_as_it_was(cluster: Cluster, fail: Any) -> None:
    tasks = (await cluster.status()).live["tasks"]
    for fields, _ in BAD:
        await fail(**fields)
    await cluster.idle()
    assert (await cluster.status()).live["tasks"] <= tasks + 1
    assert ids_of(await cluster.generate()) == cluster.answer


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"on_disconnect": gen.ON_DISCONNECT_LINGER}, "on_disconnect"),
    ],
)
async def test_what_does_not_work_yet_says_so(fail: Any, fields: dict[str, Any], field: str) -> None:
    error = await fail(**fields)
    assert isinstance(error, Unimplemented)
    assert error.field == field


async def test_no_input_at_all(fail: Any) -> None:
    error = await fail(raw=b"")
    assert isinstance(error, InvalidArgument)
    assert "prompt, token_ids, chat" in str(error)


async def test_numbers_are_in_the_message(fail: Any) -> None:
    error = await fail(token_ids=gen.TokenIds(ids=[3] * 10), stopping=gen.Stopping(max_tokens=CONTEXT - 9))
    assert error.field == "stopping.max_tokens"
    assert all(str(number) in str(error) for number in (CONTEXT, CONTEXT - 9, 10, CONTEXT - 10))


async def test_a_sequence_that_no_worker_can_hold(empty: Cluster) -> None:
    await empty.add("p0", "prefill")
    await empty.add("d0", "decode", blocks=4)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await empty.generate(stopping=gen.Stopping(max_tokens=100))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "decode_blocks" in str(caught.value.trailing_metadata())
    events = await empty.generate(token_ids=gen.TokenIds(ids=[3] * 5))
    assert events[0].accepted.max_tokens == 4 * 16 + 1 - 5, "a limit left open is what fits"


INVALID_UTF8 = [
    (gen.GenerateRequest(prompt="GOOD"), "prompt"),
    (gen.GenerateRequest(chat=chat(("user", "fine"), ("user", "GOOD"))), "chat.messages[1].content"),
    (gen.GenerateRequest(prompt="x", stopping=gen.Stopping(stop=["a", "GOOD"])), "stopping.stop[1]"),
    (gen.GenerateRequest(prompt="x", tenant_salt="GOOD"), "tenant_salt"),
]


@pytest.mark.parametrize(("message", "field"), INVALID_UTF8)
async def test_text_that_is_not_utf8_names_the_field(fail: Any, message: gen.GenerateRequest, field: str) -> None:
    error = await fail(raw=message.SerializeToString().replace(b"GOOD", b"GO\xffD"))
    assert isinstance(error, InvalidArgument)
    assert error.field == field
    assert "not valid UTF-8 at byte 2" in str(error)


async def test_tokenize_names_it_too(fail: Any) -> None:
    raw = gen.TokenizeRequest(prompt="GOOD").SerializeToString().replace(b"GOOD", b"\xff\xff\xff\xff")
    assert (await fail(raw=raw, method="Tokenize")).field == "prompt"


async def test_bytes_that_are_no_message(fail: Any) -> None:
    error = await fail(raw=b"\xff\xff\xff\xff\xff")
    assert isinstance(error, InvalidArgument)
    assert "GenerateRequest" in str(error)


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (gen.GenerateRequest(prompt="x" * (REQUEST_LIMIT_BYTES + 1)), "prompt"),
        (gen.GenerateRequest(token_ids=gen.TokenIds(ids=[300] * (REQUEST_LIMIT_BYTES // 2))), "token_ids.ids"),
        (gen.GenerateRequest(chat=chat(*[("user", "x" * 1000)] * 5000)), "chat.messages"),
    ],
    ids=["prompt", "token_ids", "chat"],
)
async def test_an_oversized_message_names_its_largest_field(
    fail: Any, message: gen.GenerateRequest, field: str
) -> None:
    error = await fail(raw=message.SerializeToString())
    assert isinstance(error, InvalidArgument)
    assert error.field == field
    assert str(REQUEST_LIMIT_BYTES) in str(error)


def test_largest_field_looks_into_messages() -> None:
    message = gen.GenerateRequest(request_id="short", stopping=gen.Stopping(stop=["x" * 50], max_tokens=3))
    assert too_large(gen.GenerateRequest, message.SerializeToString(), 9).field == "stopping.stop"


def test_explain_without_a_bad_string() -> None:
    assert explain(gen.GenerateRequest, b"\x0a\x05abc").field == ""


def test_defaults_are_the_documented_ones() -> None:
    checked = check_request(gen.GenerateRequest(prompt="x"))
    given = checked.sampling
    assert (given.temperature, given.top_k, given.top_p, given.min_p) == (1.0, 0, 1.0, 0.0)
    assert (given.repetition_penalty, given.presence_penalty, given.frequency_penalty) == (1.0, 0.0, 0.0)
    assert given.logprobs is None
    assert checked.max_tokens is None
    assert checked.objectives.ttft_ms is None


def test_limits_themselves_are_allowed() -> None:
    checked = check_request(
        gen.GenerateRequest(
            prompt="x",
            request_id="x" * 128,
            priority=-100,
            logprobs=0,
            sampling=gen.Sampling(temperature=0, top_p=1, min_p=1, presence_penalty=-2, frequency_penalty=2, seed=0),
            stopping=gen.Stopping(stop=["x" * 256] * 16, stop_token_ids=range(64)),
        )
    )
    assert checked.sampling.logprobs == 0
    assert checked.sampling.seed == 0
    assert checked.stop == ("x" * 256,)
