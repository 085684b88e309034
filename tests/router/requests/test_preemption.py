"""No room on a decode worker: handoffs that wait for it, and sequences that lost theirs."""

from __future__ import annotations

import os
from typing import Any

import pytest

from baton.config import RouterConfig
from baton.v1 import generation_pb2 as gen
from baton.v1 import worker_pb2 as wire
from tests.router.conftest import Cluster, ids_of, refused


async def waits(cluster: Cluster, call: Any) -> list[Any]:
    """The events so far of a request whose decode worker has no room."""
    cluster.prefill.gate("bound")
    events = [await anext(call), await anext(call)]
    await cluster.prefill.at("bound")
    cluster.prefill.says(
        handoff_waiting=wire.HandoffWaiting(attempt=cluster.prefill.attempts[0], handoff=1, ahead=3, expected_ms=20.0)
    )
    await cluster.until(lambda: cluster.counted("handoffs_waiting") == 1)
    return events


async def preempted(cluster: Cluster, tokens: int, cached: int = 0) -> None:
    """The request loses its room before the token of this index of its attempt."""
    step = f"step {tokens}"
    await cluster.decode.at(step)
    cluster.decode.gates.pop(step, None)
    cluster.decode.reached.pop(step, None)
    cluster.decode.says(preempted=wire.Preempted(attempt=cluster.decode.attempts[-1], cached_tokens=cached))


async def test_a_handoff_that_waits_is_answered_later(cluster: Cluster) -> None:
    call = aiter(cluster.call())
    events = await waits(cluster, call)
    cluster.prefill.gates["bound"].set()
    events += [event async for event in call]
    assert ids_of(events) == cluster.answer
    assert events[-1].finished.timeline.handoffs == 1
    assert not cluster.counted("handoffs_moved")
    await cluster.idle()


async def test_a_handoff_that_waits_goes_where_there_is_room(cluster: Cluster) -> None:
    await cluster.add("d1", "decode")
    call = aiter(cluster.call())
    events = await waits(cluster, call)
    await cluster.until(lambda: cluster.prefill.count("bind") == 2)
    first, second = (command.bind for command in cluster.prefill.commands if command.HasField("bind"))
    assert (first.handoff, second.handoff) == (1, 2)
    assert {first.decode_worker.name, second.decode_worker.name} == {"d0", "d1"}
    left = cluster.workers[first.decode_worker.name]
    await cluster.until(lambda: left.cancelled == cluster.prefill.attempts)
    cluster.prefill.refusals = [refused("EXPIRED")]  # what became of the first one, which is late
    cluster.prefill.gates["bound"].set()
    events += [event async for event in call]
    assert ids_of(events) == cluster.answer
    assert events[-1].finished.timeline.decode_worker == second.decode_worker.name
    assert cluster.counted("handoffs_moved") == 1


async def test_where_the_worker_that_it_went_to_dies_it_may_come_back_to_the_first(cluster: Cluster) -> None:
    """That one has a tombstone of the attempt, so that another attempt is needed."""
    await cluster.add("d1", "decode")
    call = aiter(cluster.call())
    events = await waits(cluster, call)
    await cluster.until(lambda: cluster.prefill.count("bind") == 2)
    left, bound = (c.bind.decode_worker.name for c in cluster.prefill.commands if c.HasField("bind"))
    await cluster.workers[bound].stop()
    await cluster.until(lambda: cluster.prefill.count("prefill") == 2)
    cluster.prefill.gates["bound"].set()
    events += [event async for event in call]
    assert ids_of(events) == cluster.answer
    timeline = events[-1].finished.timeline
    assert (timeline.decode_worker, timeline.attempts) == (left, 2)
    await cluster.idle()


@pytest.mark.parametrize("how", ["whole", "cut off", "left by its client"])
async def test_how_long_outputs_become_is_learned(cluster: Cluster, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (model,) = cluster.router.registry.models.values()
    seen: list[tuple[int, bool]] = []
    monkeypatch.setattr(model.lengths, "observe", lambda tokens, *, complete: seen.append((tokens, complete)))
    if how == "left by its client":
        cluster.decode.gate("step 2")
        call = cluster.call()
        events = aiter(call)
        for _ in range(3):
            await anext(events)
        call.cancel()
    else:
        await cluster.generate(**{"stopping": gen.Stopping(max_tokens=2)} if how == "cut off" else {})
    await cluster.until(lambda: seen)
    assert seen == [(len(cluster.answer) if how == "whole" else 2, how == "whole")]
    await cluster.idle()


async def test_a_preempted_sequence_goes_on_with_what_came(cluster: Cluster) -> None:
    cluster.decode.gate("step 2")
    call = aiter(cluster.call())
    events = [await anext(call) for _ in range(3)]
    await preempted(cluster, 2)
    events += [event async for event in call]
    assert ids_of(events) == cluster.answer
    timeline = events[-1].finished.timeline
    assert (timeline.attempts, timeline.preemptions) == (2, 1)
    (former,) = timeline.former_attempts
    assert (former.decode_worker, former.tokens, former.why) == ("d0", 2, "preempted on d0")
    again = [command.prefill.spec for command in cluster.prefill.commands if command.HasField("prefill")][1]
    assert list(again.output_tokens) == cluster.answer[:2]
    assert (again.preemptions, again.likely_tokens > 0, again.age_ms > 0) == (1, True, True)
    assert (cluster.counted("preemptions"), cluster.counted("failovers")) == (1, 0)
    await cluster.idle()


async def test_it_may_be_preempted_more_often_than_attempts_may_be_lost(cluster: Cluster) -> None:
    cluster.decode.gate("step 1")
    call = aiter(cluster.call())
    for round in range(3):
        await preempted(cluster, 1)
        if round < 2:
            cluster.decode.gate("step 1")
    events = [event async for event in call]
    assert ids_of(events) == cluster.answer
    assert events[-1].finished.timeline.attempts == 4
    await cluster.idle()


async def test_news_of_an_attempt_that_nobody_knows_changes_nothing(cluster: Cluster) -> None:
    cluster.decode.says(preempted=wire.Preempted(attempt=os.urandom(16), cached_tokens=0))
    cluster.prefill.says(handoff_waiting=wire.HandoffWaiting(attempt=os.urandom(16), handoff=1))
    await cluster.until(lambda: cluster.counted("late_preempted") == cluster.counted("late_handoff_waiting") == 1)
    assert ids_of(await cluster.generate()) == cluster.answer


@pytest.mark.parametrize("config", [RouterConfig(listen="127.0.0.1:0", name="router", path="disaggregated")])
async def test_it_goes_back_in_place_while_its_kv_lies_there(cluster: Cluster) -> None:
    """Whatever the path setting is."""
    cluster.decode.gate("step 2")
    call = cluster.call()
    events = aiter(call)
    for _ in range(3):
        await anext(events)
    await preempted(cluster, 2, cached=1000)
    await cluster.until(lambda: cluster.decode.count("direct") == 1)
    (direct,) = (command.direct.spec for command in cluster.decode.commands if command.HasField("direct"))
    assert list(direct.output_tokens) == cluster.answer[:2]
    assert cluster.prefill.count("prefill") == 1
    call.cancel()
    await cluster.idle()
