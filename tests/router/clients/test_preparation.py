"""A long text is answered as a short one is: the same ids, the same events, the same errors."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import grpc
import pytest

from baton.errors import BatonError, DeadlineExceeded, InvalidArgument
from baton.rpc.status import from_rpc_error
from baton.v1 import generation_pb2 as gen
from router.clients import parsing
from tests.router.clients.test_validation import BAD, INVALID_UTF8, chat
from tests.router.conftest import Cluster, error_of, ids_of
from tests.router.tiny_model import CONTEXT, card, encode

TEXT = "the capital of France is Paris. é 한국어 \U0001f600 <|im_end|>\n"
GOOD: list[dict[str, Any]] = [
    {"prompt": TEXT},
    {"prompt": TEXT * 300},
    {"chat": chat(("system", TEXT), ("user", ""), ("assistant", "x"))},
    {"chat": chat(*[("user", "")] * 1_000)},
    {"token_ids": gen.TokenIds(ids=[3, 4, 5])},
    {"token_ids": gen.TokenIds(ids=range(3, 300))},
    {
        "prompt": "all",
        "request_id": "mine",
        "tenant_salt": "salt",
        "sampling": gen.Sampling(temperature=0.5, seed=7, top_k=3),
        "stopping": gen.Stopping(max_tokens=50, stop=["é", "zz"], stop_token_ids=[9]),
        "logprobs": 2,
        "slo": gen.Slo(ttft_ms=1e6),
        "priority": 5,
    },
]
Ways = Callable[[bool], None]


@pytest.fixture(name="elsewhere")
def _elsewhere(monkeypatch: pytest.MonkeyPatch) -> Ways:
    """Sends all requests to the process for long texts, or none."""

    def choose(all_of_them: bool) -> None:
        limit = -1 if all_of_them else 1 << 30
        for name in ("INLINE_BYTES", "INLINE_MESSAGES", "INLINE_IDS_BYTES"):
            monkeypatch.setattr(parsing, name, limit)

    return choose


async def both(elsewhere: Ways, cluster: Cluster, work: Callable[[], Any]) -> list[Any]:
    """What the work gives both ways; none of it may pass by the way that was chosen."""
    found = []
    for chosen in (False, True):
        elsewhere(chosen)
        before = cluster.counted("long_texts")
        found.append(await work())
        assert (cluster.counted("long_texts") > before) == chosen
    return found


async def test_prompts_chats_and_ids_reach_the_worker_the_same(cluster: Cluster, elsewhere: Ways) -> None:
    for fields in GOOD:

        async def sent(fields: dict[str, Any] = fields) -> tuple[Any, ...]:
            cluster.prefill.commands.clear()
            accepted, *_ = events = await cluster.generate(**{"sampling": gen.Sampling(seed=1), **fields})
            (spec,) = (c.prefill.spec for c in cluster.prefill.commands if c.WhichOneof("body") == "prefill")
            spec.ClearField("attempt")
            for changing in ("deadline_ms", "ttft_left_ms", "age_ms"):
                spec.ClearField(changing)
            if not fields.get("request_id"):
                spec.ClearField("request_id")
                accepted.accepted.ClearField("request_id")
            for predicted in ("predicted_ttft_ms", "predicted_tpot_ms"):
                accepted.accepted.ClearField(predicted)
            return accepted, spec, ids_of(events)

        inline, processed = await both(elsewhere, cluster, sent)
        assert inline == processed
        assert inline[1].prompt_tokens


async def test_tokenize_answers_the_same(cluster: Cluster, elsewhere: Ways) -> None:
    for fields in (fields for fields in GOOD if {"prompt", "chat"} & fields.keys()):
        given = {name: fields[name] for name in ("prompt", "chat") if name in fields}

        async def answered(call: gen.TokenizeRequest = gen.TokenizeRequest(**given)) -> gen.TokenizeResponse:  # noqa: B008
            return await cluster.generation.Tokenize(call)

        inline, processed = await both(elsewhere, cluster, answered)
        assert inline == processed
        if "prompt" in given:
            assert (list(inline.ids), inline.text) == (encode(given["prompt"]), given["prompt"])


async def test_each_error_is_the_same(cluster: Cluster, elsewhere: Ways) -> None:
    given = [
        fields if {"prompt", "token_ids", "chat"} & fields.keys() else {"prompt": "x"} | fields for fields, _ in BAD
    ]
    requests = [gen.GenerateRequest(**fields).SerializeToString() for fields in given]
    requests += [message.SerializeToString().replace(b"GOOD", b"GO\xffD") for message, _ in INVALID_UTF8]
    requests += [b"", b"\xff" * 5, gen.GenerateRequest(chat=chat(*[("user", "")] * (CONTEXT + 1))).SerializeToString()]
    send: Any = cluster.channel.unary_unary("/baton.v1.Generation/Generate")

    async def refused(data: bytes) -> tuple[type, str, str]:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await send(data, timeout=10)
        error = from_rpc_error(caught.value)
        return type(error), getattr(error, "field", ""), str(error)

    for data in requests:
        found = []
        for chosen in (False, True):
            elsewhere(chosen)
            found.append(await refused(data))
        assert found[0] == found[1]
        assert issubclass(found[0][0], BatonError)
    assert cluster.counted("long_texts") > len(BAD) / 2, "the others are refused by their labels and model"
    await cluster.idle()


async def test_a_request_id_is_taken_while_its_text_waits(cluster: Cluster, elsewhere: Ways) -> None:
    elsewhere(True)
    fields = {"request_id": "mine", "tenant_salt": "salt", "prompt": "hello"}
    calls = [asyncio.create_task(error_or_ids(cluster, **fields)) for _ in range(3)]
    ended = await asyncio.gather(*calls)
    duplicates = [error for error in ended if isinstance(error, InvalidArgument)]
    assert [error.field for error in duplicates] == ["request_id"] * 2
    assert cluster.counted("long_texts") == 1, "a duplicate is not processed"
    assert await cluster.generate(**fields), "its label is free again"


async def error_or_ids(cluster: Cluster, **fields: Any) -> Any:
    try:
        return ids_of(await cluster.generate(**fields))
    except grpc.aio.AioRpcError as error:
        return from_rpc_error(error)


async def test_a_deadline_ends_the_wait_for_a_long_text(cluster: Cluster) -> None:
    error = await error_of(cluster.call(prompt="0123456789" * 100_000, timeout=0.2))
    assert isinstance(error, DeadlineExceeded)
    await cluster.idle()


async def test_a_router_without_workers_processes_no_long_text(empty: Cluster) -> None:
    error = await error_of(empty.call(prompt="x" * 100_000))
    assert "no worker has joined" in str(error)
    assert empty.counted("text_process_starts") == 0


async def test_the_limit_on_bytes_follows_the_largest_context(empty: Cluster) -> None:
    small = card(context_tokens=100)
    await empty.add("p0", "prefill", card=small)
    await empty.add("d0", "decode", card=small)
    error = await error_of(empty.call(prompt="x" * 80_000))
    assert isinstance(error, InvalidArgument)
    assert str(error) == f"prompt: takes 80004 of 80004 bytes; a request has at most {64 * 1024 + 6_400}"
    error = await error_of(empty.call(chat=chat(*[("user", "")] * 101)))
    assert str(error) == "chat.messages: at most 100, as the context has tokens, not 101"
