"""The life of a request through a real router, from its arrival to each of its good ends."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from baton.rpc.lanes import FRAGMENT_BYTES
from baton.v1 import generation_pb2 as gen
from baton.v1 import worker_pb2 as wire
from tests.router.conftest import Cluster, ids_of, text_of
from tests.router.tiny_model import CONTEXT, EOS, encode, tokenizer


async def test_a_prompt_goes_through_both_workers(cluster: Cluster) -> None:
    events = await cluster.generate(request_id="mine", prompt="hello world", slo=gen.Slo(ttft_ms=1e4, tpot_ms=1e-3))
    first, last = events[0].accepted, events[-1].finished
    assert (first.request_id, first.model, first.prompt_tokens) == ("mine", "tiny", len(encode("hello world")))
    assert not first.HasField("predicted_ttft_ms")
    assert ids_of(events) == cluster.answer
    assert text_of(events) == "Paris is the capital"
    assert last.reason == gen.FINISH_REASON_EOS
    assert last.usage.output_tokens == len(cluster.answer)
    assert last.usage.prompt_tokens == first.prompt_tokens
    timeline = last.timeline
    assert (timeline.prefill_worker, timeline.decode_worker, timeline.path) == ("p0", "d0", gen.PATH_DISAGGREGATED)
    assert (timeline.transport, timeline.transfer_blocks, timeline.handoffs, timeline.attempts) == ("memory", 2, 1, 1)
    assert (timeline.queue_ms, timeline.prefill_ms, timeline.decode_ms) == (1.5, 7.5, 3.5)
    assert 0 < timeline.ttft_ms <= timeline.total_ms
    assert timeline.tpot_ms > 0
    assert (last.slo.ttft_kept, last.slo.tpot_kept) == (True, False)
    await cluster.idle()


async def test_absent_objectives_have_no_outcome(cluster: Cluster) -> None:
    last = (await cluster.generate())[-1].finished
    assert not last.slo.HasField("ttft_kept")
    assert not last.slo.HasField("tpot_kept")


async def test_positions_are_absolute_and_without_gaps(cluster: Cluster) -> None:
    events = await cluster.generate(token_ids=gen.TokenIds(ids=[5, 6, 7]))
    position = 3
    for event in events[1:-1]:
        assert event.tokens.position == position
        position += len(event.tokens.ids)
    assert position == 3 + len(cluster.answer)


async def test_the_spec_travels_whole(cluster: Cluster) -> None:
    await cluster.generate(
        token_ids=gen.TokenIds(ids=[5, 6]),
        sampling=gen.Sampling(temperature=0.5, seed=7, top_k=3),
        stopping=gen.Stopping(max_tokens=50, stop_token_ids=[9], ignore_eos=False),
        priority=4,
        tenant_salt="salt",
        logprobs=2,
    )
    spec = next(command.prefill.spec for command in cluster.prefill.commands if command.HasField("prefill"))
    assert list(spec.prompt_tokens) == [5, 6]
    assert (spec.sampling.temperature, spec.sampling.seed, spec.sampling.top_k) == (0.5, 7, 3)
    assert (spec.sampling.top_p, spec.sampling.repetition_penalty, spec.sampling.logprobs) == (1.0, 1.0, 2)
    assert (spec.max_tokens, list(spec.stop_token_ids), list(spec.eos_token_ids)) == (50, [9], [EOS])
    assert (spec.priority, spec.tenant_salt, spec.router.name) == (4, "salt", "router")
    assert 0 < spec.deadline_ms <= 5050, "gRPC rounds a call's timeout up"
    assert len(spec.attempt) == 16


async def test_a_minted_seed_is_told(cluster: Cluster) -> None:
    seeds = [(await cluster.generate())[0].accepted.seed for _ in range(2)]
    assert seeds[0] != seeds[1]


async def test_the_first_token_does_not_wait_for_the_handoff(cluster: Cluster) -> None:
    gate = cluster.prefill.gate("bound")
    call = cluster.call()
    assert (await call.read()).HasField("accepted")
    assert list((await call.read()).tokens.ids) == cluster.answer[:1]
    gate.set()
    events = []
    while (event := await call.read()) is not grpc.aio.EOF:
        events.append(event)
    assert ids_of(events) == cluster.answer[1:]


async def test_chat_is_rendered_and_text_is_tokenised_as_generate_would(cluster: Cluster) -> None:
    chat = gen.Chat(messages=[gen.ChatMessage(role="user", content="hello")])
    answer = await cluster.generation.Tokenize(gen.TokenizeRequest(chat=chat), timeout=5)
    assert answer.text == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert list(answer.ids) == encode(answer.text)
    await cluster.generate(chat=chat)
    spec = next(command.prefill.spec for command in cluster.prefill.commands if command.HasField("prefill"))
    assert list(spec.prompt_tokens) == list(answer.ids)


async def test_models_are_listed_with_their_workers(cluster: Cluster) -> None:
    (model,) = (await cluster.generation.ListModels(gen.ListModelsRequest(), timeout=5)).models
    assert (model.name, model.context_tokens, model.prefill_workers, model.decode_workers) == ("tiny", CONTEXT, 1, 1)


@pytest.mark.parametrize(
    ("answer", "stopping", "reason"),
    [
        ([EOS], {}, gen.FINISH_REASON_EOS),
        ([17], {"stop_token_ids": [17]}, gen.FINISH_REASON_STOP_TOKEN),
        ([17], {"max_tokens": 1}, gen.FINISH_REASON_LENGTH),
    ],
)
async def test_ends_with_its_first_token(
    cluster: Cluster, answer: list[int], stopping: dict[str, object], reason: gen.FinishReason.ValueType
) -> None:
    cluster.answer = answer
    events = await cluster.generate(stopping=gen.Stopping(**stopping))  # type: ignore[arg-type]
    last = events[-1].finished
    assert last.reason == reason
    assert ids_of(events) == answer
    assert last.timeline.path == gen.PATH_PREFILL_ONLY
    assert last.timeline.decode_worker == ""
    assert last.timeline.prefill_ms == 7.5
    assert not last.timeline.HasField("tpot_ms")
    assert not cluster.decode.attempts
    await cluster.idle()


async def test_a_single_token_binds_no_decode_worker(cluster: Cluster) -> None:
    cluster.answer = [17]
    await cluster.generate(stopping=gen.Stopping(max_tokens=1))
    assert cluster.prefill.count("bind") == 0


async def test_max_tokens_ends_it_on_the_decode_worker(cluster: Cluster) -> None:
    events = await cluster.generate(stopping=gen.Stopping(max_tokens=3))
    assert ids_of(events) == cluster.answer[:3]
    assert events[-1].finished.reason == gen.FINISH_REASON_LENGTH


async def test_eos_can_be_ignored(cluster: Cluster) -> None:
    cluster.answer = [EOS, EOS, *encode("on"), 17]
    events = await cluster.generate(stopping=gen.Stopping(ignore_eos=True, stop_token_ids=[17]))
    assert ids_of(events) == cluster.answer
    assert text_of(events) == "on"


async def test_a_stop_string_across_tokens_ends_text_and_ids(cluster: Cluster) -> None:
    cluster.answer = [*encode("Paris is"), *encode(" the"), *encode(" capital of France"), EOS]
    gate = cluster.decode.gate(f"step {len(encode('Paris is the'))}")
    events = await cluster.generate(stopping=gen.Stopping(stop=["s the"]))
    last = events[-1].finished
    gate.set()
    assert text_of(events) == "Paris i"
    assert (last.reason, last.stop) == (gen.FINISH_REASON_STOP_STRING, "s the")
    assert ids_of(events) == encode("Paris is") + encode(" the")
    assert last.usage.output_tokens == len(ids_of(events))
    assert cluster.decode.cancelled == cluster.decode.attempts
    await cluster.idle()


async def test_a_stop_string_in_the_first_token(cluster: Cluster) -> None:
    gate = cluster.prefill.gate("bound")
    cluster.answer = [*encode("the"), *encode(" capital"), EOS]
    events = await cluster.generate(stopping=gen.Stopping(stop=["t"]))
    assert text_of(events) == ""
    assert ids_of(events) == cluster.answer[:1]
    assert events[-1].finished.reason == gen.FINISH_REASON_STOP_STRING
    assert cluster.prefill.cancelled == cluster.prefill.attempts
    gate.set()
    await cluster.idle()


async def test_what_only_looked_like_a_stop_string_comes_out(cluster: Cluster) -> None:
    events = await cluster.generate(stopping=gen.Stopping(stop=["capitals"]))
    assert text_of(events) == "Paris is the capital"
    assert events[-1].finished.reason == gen.FINISH_REASON_EOS


async def test_a_split_character_comes_whole(cluster: Cluster) -> None:
    text = "a😀b"
    cluster.answer = [*encode(text), EOS]
    assert len(cluster.answer) > 5, "the emoji must be split for this test to say anything"
    events = await cluster.generate()
    assert text_of(events) == text
    assert not any("\ufffd" in event.tokens.text for event in events)


async def test_text_held_at_the_end_is_flushed(cluster: Cluster) -> None:
    cluster.answer = [*encode("a😀")[:2], EOS]
    assert text_of(await cluster.generate()) == "a\ufffd"


async def test_logprobs_reach_the_client_with_their_ids(cluster: Cluster) -> None:
    gate = cluster.prefill.gate("started")
    cluster.answer = [17, EOS]
    call = cluster.call(logprobs=1)
    await cluster.prefill.at("started")
    attempt = cluster.prefill.attempts[0]
    entry = gen.TokenLogprobs(logprob=-0.5, top=[gen.Alternative(id=17, logprob=-0.5)])
    run = wire.TokenRun(attempt=attempt, position=len(encode("hello world")), ids=[17], logprobs=[entry])
    cluster.prefill.says(tokens=wire.TokenFrame(runs=[run]))
    gate.set()
    events = [event async for event in call]
    scores = [score for event in events for score in event.tokens.logprobs]
    assert scores == [entry]


async def test_many_at_once_and_the_books_balance(cluster: Cluster) -> None:
    results = await asyncio.gather(*(cluster.generate(prompt=f"prompt {number}") for number in range(64)))
    assert all(ids_of(events) == cluster.answer for events in results)
    assert len(set(cluster.prefill.attempts)) == 64
    await cluster.idle()
    status = await cluster.status()
    assert (status.live["requests"], status.live["workers"], status.live["sessions"]) == (0, 2, 2)
    assert status.counters["requests_finished"] == 64
    assert status.resident_bytes > 0


async def test_a_long_prompt_travels_in_pieces(cluster: Cluster) -> None:
    ids = [3 + number % 300 for number in range(50_000)]
    assert len(ids) * 1.5 > FRAGMENT_BYTES
    await cluster.generate(token_ids=gen.TokenIds(ids=ids), stopping=gen.Stopping(max_tokens=2))
    spec = next(command.prefill.spec for command in cluster.prefill.commands if command.HasField("prefill"))
    assert list(spec.prompt_tokens) == ids


def test_the_tokeniser_of_these_tests_is_sane() -> None:
    assert tokenizer().decode(encode("Paris is the capital")) == "Paris is the capital"
