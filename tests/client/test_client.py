"""The SDK against a real gRPC server that speaks from a script."""

from __future__ import annotations

import asyncio
import math
import socket
from collections.abc import AsyncIterator
from contextlib import aclosing

import pytest
import pytest_asyncio

from baton import errors
from baton.client import Accepted, Client, Event, Finished, FinishReason, Path, RequestOptions, TokenLogprobs, Tokens
from baton.client.client import deadline_of
from baton.v1 import generation_pb2 as gen
from tests.client.double import DEGRADED, Double, serving, serving_half

WAIT_S = 5.0


@pytest_asyncio.fixture
async def double() -> AsyncIterator[Double]:
    async with serving(Double()) as running:
        yield running


@pytest_asyncio.fixture
async def client(double: Double) -> AsyncIterator[Client]:
    async with Client(double.address) as connected:
        yield connected


async def test_a_stream_is_accepted_then_tokens_then_finished(client: Client) -> None:
    events = [event async for event in client.generate("hi")]
    assert [type(event) for event in events] == [Accepted, Tokens, Tokens, Tokens, Finished]
    first, last = events[0], events[-1]
    assert first == Accepted("r-1", "tiny", 7, 5, 3)
    assert events[1] == Tokens(5, (100,), "The capital")
    assert isinstance(last, Finished)
    assert last.reason is FinishReason.EOS
    assert last.timeline.path is Path.DISAGGREGATED
    assert last.slo is not None
    assert (last.slo.ttft_kept, last.slo.tpot_kept) == (True, None)


async def test_a_completion_is_the_whole_stream(client: Client) -> None:
    answer = await client.complete("hi", logprobs=1)
    assert answer.text == "The capital of France is Paris."
    assert answer.token_ids == (100, 101, 102)
    assert answer.logprobs == (TokenLogprobs(-0.5, ((200, -1.5),)),) * 3
    assert answer.finish_reason is FinishReason.EOS
    assert answer.usage.output_tokens == 3
    assert (answer.timeline.transport, answer.timeline.transfer_blocks) == ("shm", 1)


async def test_every_option_arrives(client: Client, double: Double) -> None:
    await client.complete(
        messages=[("system", "short"), ("user", "hi")],
        model="tiny",
        request_id="mine",
        temperature=0.0,
        top_k=5,
        top_p=0.5,
        min_p=0.25,
        seed=2**63,
        repetition_penalty=1.5,
        presence_penalty=-1.0,
        frequency_penalty=1.0,
        max_tokens=9,
        stop=["a", "b"],
        stop_token_ids=[3],
        ignore_eos=True,
        logprobs=0,
        ttft_ms=100.0,
        tpot_ms=20.0,
        priority=-3,
        when_unmet="best_effort",
        on_disconnect="cancel",
        tenant_salt="salt",
    )
    (request,) = double.requests
    assert [(message.role, message.content) for message in request.chat.messages] == [
        ("system", "short"),
        ("user", "hi"),
    ]
    assert not request.HasField("prompt")
    assert not request.HasField("token_ids")
    assert request.sampling == gen.Sampling(
        temperature=0,
        top_k=5,
        top_p=0.5,
        min_p=0.25,
        seed=2**63,
        repetition_penalty=1.5,
        presence_penalty=-1,
        frequency_penalty=1,
    )
    assert request.sampling.HasField("temperature")
    assert request.stopping == gen.Stopping(max_tokens=9, stop=["a", "b"], stop_token_ids=[3], ignore_eos=True)
    assert request.HasField("logprobs")
    assert request.slo == gen.Slo(ttft_ms=100, tpot_ms=20)
    assert (request.model, request.request_id, request.priority) == ("tiny", "mine", -3)
    assert (request.when_unmet, request.on_disconnect) == (gen.UNMET_POLICY_BEST_EFFORT, gen.ON_DISCONNECT_CANCEL)
    assert request.tenant_salt == "salt"


async def test_what_is_not_given_is_absent(client: Client, double: Double) -> None:
    await client.complete("hi")
    assert double.requests == [gen.GenerateRequest(prompt="hi")]


async def test_empty_inputs_are_sent_as_given(client: Client, double: Double) -> None:
    await client.complete(token_ids=[])
    await client.complete(messages=[])
    await client.complete("")
    ids, chat, prompt = double.requests
    assert ids.HasField("token_ids")
    assert chat.HasField("chat")
    assert prompt.HasField("prompt")


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"top_k": -1}, "sampling.top_k"),
        ({"seed": 2**64}, "sampling.seed"),
        ({"max_tokens": -5}, "stopping.max_tokens"),
        ({"token_ids": [1, -2]}, "token_ids"),
        ({"stop": ["\udcff"]}, "stopping.stop"),
        ({"messages": [("user", "\udcff")]}, "chat.messages[0].content"),
        ({"when_unmet": "never"}, "when_unmet"),
        ({"temperature": "hot"}, "sampling.temperature"),
    ],
)
async def test_what_the_wire_cannot_carry_is_refused_by_name(
    client: Client, options: RequestOptions, field: str
) -> None:
    with pytest.raises(errors.InvalidArgument) as caught:
        await client.complete(**options)
    assert caught.value.field == field


async def test_an_unknown_option_is_a_type_error(client: Client) -> None:
    with pytest.raises(TypeError, match="max_token"):
        await client.complete("hi", max_token=3)  # type: ignore[call-arg]


async def test_a_refusal_names_its_field(client: Client, double: Double) -> None:
    double.error = errors.InvalidArgument("sampling.top_p", "must be in (0, 1]")
    with pytest.raises(errors.InvalidArgument, match="must be in") as caught:
        await client.complete("hi")
    assert caught.value.field == "sampling.top_p"


async def test_no_room_says_when_to_try_again(client: Client, double: Double) -> None:
    double.error = errors.ResourceExhausted("no decode blocks", 1.5, "decode_blocks")
    with pytest.raises(errors.ResourceExhausted) as caught:
        await client.complete("hi")
    assert (caught.value.retry_after_s, caught.value.constraint) == (1.5, "decode_blocks")


async def test_a_failure_in_the_middle_comes_after_the_tokens(client: Client, double: Double) -> None:
    double.error, double.after = errors.Unavailable("decode-0 is gone"), 2
    events = client.generate("hi")
    seen: list[Event] = [await anext(events) for _ in range(3)]
    with pytest.raises(errors.Unavailable, match="decode-0 is gone"):
        await anext(events)
    assert [type(event) for event in seen] == [Accepted, Tokens, Tokens]


async def test_a_stream_without_a_result_is_an_error(client: Client, double: Double) -> None:
    double.silent = True
    with pytest.raises(errors.Internal, match="without a result"):
        await client.complete("hi")


async def test_leaving_the_loop_cancels_on_the_server(client: Client, double: Double) -> None:
    double.endless = True
    async for event in client.generate("hi"):
        if isinstance(event, Tokens):
            break
    async with asyncio.timeout(WAIT_S):
        await double.cancelled.wait()


async def test_closing_the_stream_cancels_on_the_server(client: Client, double: Double) -> None:
    double.endless = True
    async with aclosing(client.generate("hi")) as events:
        await anext(events)
    async with asyncio.timeout(WAIT_S):
        await double.cancelled.wait()


async def test_cancelling_the_task_cancels_on_the_server(client: Client, double: Double) -> None:
    double.endless = True
    task = asyncio.create_task(client.complete("hi"))
    async with asyncio.timeout(WAIT_S):
        await double.received.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await double.cancelled.wait()


async def test_a_timeout_is_the_calls_deadline(client: Client, double: Double) -> None:
    double.endless = True
    with pytest.raises(errors.DeadlineExceeded, match=r"within 0\.2 s"):
        await client.complete("hi", timeout=0.2)
    async with asyncio.timeout(WAIT_S):
        await double.cancelled.wait()


async def test_nobody_listening_is_unavailable_in_plain_words() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        async with Client(address) as client:
            with pytest.raises(errors.Unavailable) as caught:
                await client.models()
    assert str(caught.value) == f"cannot reach {address}: connection refused"


async def test_another_kind_of_server_is_told_apart() -> None:
    async with serving_half() as address, Client(address) as client:
        with pytest.raises(errors.InvalidArgument, match="does not offer this"):
            await client.models()


@pytest.mark.parametrize(
    ("given", "told"),
    [(None, None), (math.inf, None), (1e300, 604_800.0), (1e10, 604_800.0), (2.5, 2.5), (1e-300, 1e-300)],
)
def test_grpc_is_told_of_no_timeout_that_it_cant_hold(given: float | None, told: float | None) -> None:
    assert deadline_of(given) == told


def test_a_bad_address_is_a_config_error() -> None:
    with pytest.raises(errors.ConfigError, match="HOST:PORT"):
        Client("nowhere")


async def test_the_unary_calls(client: Client, double: Double) -> None:
    assert (await client.tokenize("text")).text == "text"
    assert (await client.tokenize(messages=[("user", "hi")], model="tiny")).ids == (1, 2, 3)
    assert double.tokenized[1].chat.messages[0].content == "hi"
    (model,) = await client.models()
    assert (model.name, model.prefill_workers, model.decode_workers) == ("tiny", 1, 2)
    found = await client.workers()
    assert found.degraded == (DEGRADED,)
    (worker,) = found
    assert (worker.name, worker.roles, worker.transports) == ("prefill-0", ("prefill",), ("shm", "tcp"))
    assert (worker.load.waiting, worker.load.running, worker.load.held_blocks) == (1, 2, 3)
    status = await client.status()
    assert status.degraded == (DEGRADED,)
    assert status.pool is not None
    assert (status.pool.free, status.live, status.counters) == (7, {"requests": 2}, {"late_messages": 1})


async def test_health(client: Client) -> None:
    assert await client.health() == "serving"
    assert await client.health("baton.v1.Generation") == "serving"
    assert await client.health("no.such.Service") == "service_unknown"


def test_the_options_are_those_of_the_proto() -> None:
    names = {"messages"}
    for field in gen.GenerateRequest.DESCRIPTOR.fields:
        inner = field.message_type
        flat = field.name in ("sampling", "stopping", "slo")
        names |= {entry.name for entry in inner.fields} if flat and inner else {field.name}
    assert names - {"prompt", "chat"} == RequestOptions.__annotations__.keys()
