"""Requests whose worker dies go on at another one: no token twice, none missing."""

from __future__ import annotations

import asyncio

import pytest

from baton.rpc.convert import spec_from_wire
from baton.spec import SequenceSpec
from baton.telemetry import Counts
from baton.v1 import generation_pb2 as gen
from baton.v1 import worker_pb2 as wire
from baton.worker.prompt_queue import AGEING_S
from router.requests.failover import AT_ONCE, Failovers
from router.requests.stream import Output
from router.text.detokenisation import OutputText
from router.workers import pulse
from tests.router.conftest import Cluster, ids_of, text_of
from tests.router.doubles import WorkerDouble

# While it decodes.


def prompts_at(worker: WorkerDouble) -> list[SequenceSpec]:
    """What it was asked to compute, in order."""
    return [spec_from_wire(frame.prefill.spec) for frame in worker.commands if frame.WhichOneof("body") == "prefill"]


async def test_the_output_goes_on_where_it_was(cluster: Cluster) -> None:
    cluster.decode.gate("step 2")
    call = cluster.call(sampling=gen.Sampling(seed=7), logprobs=None)
    stream = aiter(call)
    events = [await anext(stream) for _ in range(3)]  # accepted, and two tokens
    await cluster.add("d1", "decode")
    await cluster.decode.stop()
    events += [event async for event in stream]
    assert ids_of(events) == cluster.answer
    assert text_of(events) == "Paris is the capital"
    positions = [event.tokens.position for event in events[1:-1]]
    assert positions == sorted(set(positions)), "each once"
    finished = events[-1].finished
    assert (finished.timeline.attempts, finished.timeline.handoffs, finished.timeline.decode_worker) == (2, 2, "d1")
    assert finished.usage.output_tokens == len(cluster.answer)
    first, second = prompts_at(cluster.prefill)
    assert (first.output, second.output) == ((), tuple(cluster.answer[:2]))
    assert first.attempt != second.attempt
    assert first.ttft_left_s is None
    assert second.ttft_left_s is not None
    assert AGEING_S - 5 < second.ttft_left_s < AGEING_S, "it keeps its age in the queue"
    assert (first.prompt, first.sampling, first.max_tokens) == (second.prompt, second.sampling, second.max_tokens)
    assert cluster.counted("failovers") == 1
    await cluster.idle()


async def test_other_streams_feel_nothing(cluster: Cluster) -> None:
    cluster.decode.gate("step 2")
    first = cluster.call(request_id="lost")
    await cluster.decode.at("step 2")
    other = await cluster.add("d1", "decode")
    gate = other.gate("step 2")
    second = cluster.call(request_id="kept")
    await other.at("step 2")
    await cluster.decode.stop()
    await cluster.until(lambda: cluster.counted("failovers") == 1)
    gate.set()
    events = [event async for event in second]
    assert ids_of(events) == cluster.answer
    assert events[-1].finished.timeline.attempts == 1
    assert ids_of([event async for event in first]) == cluster.answer
    await cluster.idle()


async def test_one_whose_arrival_was_not_told_goes_on_too(cluster: Cluster) -> None:
    """The prefill worker has freed its blocks; the decode worker dies before it says that it has them."""
    await cluster.add("d1", "decode")
    cluster.decode.gate("received")
    call = cluster.call()
    await cluster.decode.at("received")
    cluster.prefill.says(prefill_report=wire.PrefillReport(attempt=cluster.prefill.attempts[0]))
    await cluster.until(lambda: len(cluster.router.registry.by_name("p0").prefill) == 0)
    await asyncio.sleep(0.05)
    await cluster.decode.stop()
    assert ids_of([event async for event in call]) == cluster.answer
    await cluster.idle()


# Before it decodes.


@pytest.mark.parametrize("phase", ["queued", "started", "bound"])
async def test_a_prompt_whose_worker_dies_is_computed_elsewhere(cluster: Cluster, phase: str) -> None:
    cluster.prefill.gate(phase)
    call = cluster.call()
    await cluster.prefill.at(phase)
    await cluster.add("p1", "prefill")
    await cluster.prefill.stop()
    events = [event async for event in call]
    assert ids_of(events) == cluster.answer
    timeline = events[-1].finished.timeline
    assert (timeline.attempts, timeline.prefill_worker) == (2, "p1")
    await cluster.idle()


# While its worker does not move.


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a router that is made later."""
    monkeypatch.setattr(pulse, "SILENT_S", 0.1)


async def test_a_stream_leaves_a_worker_that_does_not_move_which_is_not_lost(
    impatient: None, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As soon as another one is there."""
    gate = cluster.decode.gate("step 2")
    call = cluster.call()
    await cluster.decode.at("step 2")
    await cluster.until(lambda: not cluster.usable("d0"))
    says = cluster.decode.says
    monkeypatch.setattr(cluster.decode, "says", lambda **_: None)  # or its answer to the cancel shows that it moves
    await cluster.add("d1", "decode")
    events = [event async for event in call]
    assert ids_of(events) == cluster.answer
    timeline = events[-1].finished.timeline
    assert (timeline.attempts, timeline.decode_worker) == (2, "d1")
    gate.set()
    (attempt,) = cluster.decode.cancelled
    says(freed=wire.Freed(attempt=attempt))
    await cluster.until(lambda: cluster.usable("d0"))
    assert not cluster.counted("workers_lost")
    await cluster.idle()


async def test_one_that_was_only_bound_to_it_is_bound_elsewhere(
    impatient: None, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The prompt is not computed again."""
    cluster.decode.gate("received")
    call = cluster.call()
    await cluster.decode.at("received")
    monkeypatch.setattr(cluster.decode, "says", lambda **_: None)
    await cluster.until(lambda: not cluster.usable("d0"))
    await cluster.add("d1", "decode")
    await cluster.until(lambda: cluster.prefill.count("bind") == 2)
    assert cluster.prefill.count("prefill") == 1
    assert cluster.counted("failovers") == 0
    call.cancel()


async def test_without_another_worker_it_stays_and_goes_on(impatient: None, cluster: Cluster) -> None:
    gate = cluster.decode.gate("step 2")
    call = cluster.call()
    await cluster.decode.at("step 2")
    await cluster.until(lambda: not cluster.usable("d0"))
    assert cluster.router.ready
    gate.set()
    events = [event async for event in call]
    assert ids_of(events) == cluster.answer
    assert events[-1].finished.timeline.attempts == 1
    await cluster.idle()


# Ends.


async def test_a_stop_string_is_found_across_two_attempts(cluster: Cluster) -> None:
    cluster.decode.gate("step 2")
    call = cluster.call(stopping=gen.Stopping(stop=["the cap"]))
    await cluster.decode.at("step 2")
    await cluster.add("d1", "decode")
    await cluster.decode.stop()
    events = [event async for event in call]
    assert text_of(events) == "Paris is "
    assert events[-1].finished.reason == gen.FINISH_REASON_STOP_STRING
    await cluster.idle()


async def test_where_only_the_news_of_the_end_was_lost_nothing_is_computed_again(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    says = cluster.decode.says
    monkeypatch.setattr(cluster.decode, "says", lambda **body: None if "ended" in body else says(**body))
    call = aiter(cluster.call())
    events = [await anext(call) for _ in range(len(cluster.answer) + 1)]
    await cluster.add("d1", "decode")
    await cluster.decode.stop()
    events += [event async for event in call]
    assert ids_of(events) == cluster.answer
    finished = events[-1].finished
    assert (finished.reason, finished.timeline.attempts) == (gen.FINISH_REASON_EOS, 1)
    assert (finished.timeline.path, finished.timeline.decode_worker) == (gen.PATH_DISAGGREGATED, "d0")
    await cluster.idle()


async def test_a_client_that_leaves_between_two_attempts_leaves_nothing(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting: list[object] = []
    monkeypatch.setattr(Failovers, "add", lambda self, priority, arrived, place: waiting.append(place))
    cluster.decode.gate("step 2")
    call = cluster.call()
    await cluster.decode.at("step 2")
    await cluster.add("d1", "decode")
    await cluster.decode.stop()
    await cluster.until(lambda: waiting)
    call.cancel()
    await cluster.until(lambda: not cluster.router.requests.live()["requests"])
    (place,) = waiting
    place()  # type: ignore[operator]
    assert not cluster.counted("failovers")
    await cluster.idle()


async def test_many_are_placed_a_few_at_a_time_by_priority_and_age() -> None:
    failovers, placed = Failovers(), []
    for number in range(3 * AT_ONCE):
        failovers.add(number % 2, 100.0 - number, lambda number=number: placed.append(number))  # type: ignore[misc]
    await asyncio.sleep(0)
    assert len(placed) <= AT_ONCE
    async with asyncio.timeout(5.0):
        while len(failovers):
            await asyncio.sleep(0.001)
    assert placed == sorted(range(3 * AT_ONCE), key=lambda number: (-(number % 2), 100.0 - number))


def test_what_came_beyond_a_gap_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another attempt may draw other tokens there: positions alone must not mix two outputs."""
    monkeypatch.setattr(OutputText, "push", lambda self, token: ("", None))
    output = Output(10, 8, OutputText.__new__(OutputText), Counts())
    output.accept(10, [1], ())
    output.accept(12, [3], ())
    assert output.ids == (1,)
    output.forget_beyond()
    piece = output.accept(11, [7], ())
    assert piece is not None
    assert piece.ids == [7]
    assert list(output.ids) == [1, 7]
