"""Handoffs that are refused, and messages that come twice, late or in another order."""

from __future__ import annotations

import asyncio
import time

import grpc
import pytest

from baton.errors import DeadlineExceeded, ResourceExhausted, Unavailable
from baton.rpc import awake
from baton.v1 import generation_pb2 as gen
from baton.v1 import worker_pb2 as wire
from baton.v1.admin_pb2 import ListWorkersRequest
from tests.router.conftest import Cluster, error_of, ids_of, refused, text_of
from tests.router.doubles import WAIT_S
from tests.router.tiny_model import EOS, encode

# How long they take.


async def test_how_long_a_handoff_takes_is_learned_of_each_worker(cluster: Cluster) -> None:
    """From the first token until the sequence is there; what a first refusal delayed does not count."""
    assert await _handoff_ms(cluster) == {}
    for _ in range(2):
        blocks = cluster.decode.gate("received")
        async for event in cluster.call():
            if event.HasField("tokens") and not blocks.is_set():
                await asyncio.sleep(0.1)
                blocks.set()
    learned = await _handoff_ms(cluster)
    assert learned.keys() == {"d0"}
    assert learned["d0"] >= 99, "on a clock of whole milliseconds"
    (decode,) = (worker for worker in cluster.router.registry.workers() if worker.name == "d0")
    assert len(decode.handoffs) == 2
    cluster.prefill.refusals = [refused("NO_CAPACITY", retry_after_ms=1.0)]
    await cluster.generate()
    assert len(decode.handoffs) == 2


async def test_what_a_pause_of_the_router_made_long_is_not_learned(cluster: Cluster) -> None:
    blocks = cluster.decode.gate("received")
    async for event in cluster.call():
        if event.HasField("tokens") and not blocks.is_set():
            time.sleep(0.7)  # noqa: ASYNC251  holds the loop, as a suspended process does
            blocks.set()
    assert await _handoff_ms(cluster) == {}
    while awake.catching_up():
        await asyncio.sleep(0.05)
    await cluster.generate()
    assert (await _handoff_ms(cluster)).keys() == {"d0"}


async def _handoff_ms(cluster: Cluster) -> dict[str, float]:
    """Of the workers for which the router says one."""
    found = await cluster.admin.ListWorkers(ListWorkersRequest(), timeout=WAIT_S)
    return {worker.process.name: worker.handoff_ms for worker in found.workers if worker.HasField("handoff_ms")}


# Refused handoffs.


async def test_a_refused_handoff_is_bound_again_under_a_new_number(cluster: Cluster) -> None:
    cluster.prefill.refusals = [refused("NO_CAPACITY", retry_after_ms=1.0), refused("UNREACHABLE")]
    events = await cluster.generate()
    assert ids_of(events) == cluster.answer
    assert events[-1].finished.timeline.handoffs == 3
    binds = [command.bind.handoff for command in cluster.prefill.commands if command.HasField("bind")]
    assert binds == [1, 2, 3]
    assert not cluster.decode.cancelled
    await cluster.idle()


async def test_another_worker_with_room_is_bound_at_once(cluster: Cluster) -> None:
    await cluster.add("d1", "decode")
    cluster.prefill.refusals = [refused("NO_CAPACITY", retry_after_ms=4000.0)]
    events = await cluster.generate()
    assert events[-1].finished.timeline.decode_worker == "d1"
    assert events[-1].finished.timeline.total_ms < 3000


async def test_moving_on_from_an_uncertain_worker_cancels_there(cluster: Cluster) -> None:
    await cluster.add("d1", "decode")
    cluster.prefill.refusals = [refused("EXPIRED")]
    events = await cluster.generate()
    assert events[-1].finished.timeline.decode_worker == "d1"
    await cluster.until(lambda: cluster.decode.cancelled == cluster.prefill.attempts)
    await cluster.idle()


@pytest.mark.parametrize("reason", ["MISMATCH", "TOO_LARGE", "DRAINING"])
async def test_a_final_refusal_by_the_only_worker_ends_it(cluster: Cluster, reason: str) -> None:
    cluster.prefill.refusals = [refused(reason)]
    error = await error_of(cluster.call())
    assert isinstance(error, ResourceExhausted if reason == "TOO_LARGE" else Unavailable)
    assert "says the script" in str(error)
    await cluster.idle()
    assert cluster.prefill.cancelled == cluster.prefill.attempts


async def test_a_refusal_is_of_one_incarnation(cluster: Cluster) -> None:
    """Who starts again under the same name has refused nothing."""
    await cluster.add("d1", "decode")
    full = [refused("NO_CAPACITY", retry_after_ms=20.0) for _ in range(1000)]
    cluster.prefill.refusals = [refused("DRAINING"), *full]
    call = cluster.call()
    await cluster.until(lambda: cluster.prefill.count("bind") > 3)
    binds = [command.bind.decode_worker.incarnation for command in cluster.prefill.commands if command.HasField("bind")]
    assert binds[0] == "d0-1"
    assert set(binds[1:]) == {"d1-1"}
    await cluster.decode.stop()
    await cluster.until(lambda: not cluster.usable("d0"))
    await cluster.add("d0", "decode", incarnation="d0-2")
    await cluster.until(lambda: cluster.prefill.commands[-1].bind.decode_worker.incarnation == "d0-2")
    cluster.prefill.refusals = []
    assert ids_of([event async for event in call]) == cluster.answer
    await cluster.idle()


async def test_waiting_for_room_is_bounded_by_the_deadline(cluster: Cluster) -> None:
    cluster.prefill.refusals = [refused("NO_CAPACITY", retry_after_ms=30.0) for _ in range(200)]
    error = await error_of(cluster.call(timeout=1.0))
    assert isinstance(error, DeadlineExceeded)
    await cluster.idle()


# Duplicated, late and reordered messages.


async def test_everything_said_twice_changes_nothing(cluster: Cluster) -> None:
    cluster.prefill.repeats = cluster.decode.repeats = 3
    events = await cluster.generate()
    assert ids_of(events) == cluster.answer
    assert text_of(events) == "Paris is the capital"
    await cluster.idle()
    assert cluster.counted("repeated_tokens") >= 2 * len(cluster.answer)
    assert cluster.counted("late_messages") >= 2


async def test_reordered_tokens_are_delivered_by_position(cluster: Cluster) -> None:
    start = len(encode("hello world"))
    cluster.answer = [*encode("Paris"), EOS]
    gate = cluster.decode.gate("step 0")
    call = cluster.call()
    await cluster.decode.at("step 0")
    attempt = cluster.decode.attempts[0]
    for index in reversed(range(1, len(cluster.answer))):
        cluster.decode.tokens(attempt, start + index, [cluster.answer[index]])
    gate.set()
    events = [event async for event in call]
    assert ids_of(events) == cluster.answer
    assert events[1].tokens.position == start


async def test_messages_of_strangers_are_dropped_and_counted(cluster: Cluster) -> None:
    await cluster.generate()
    attempt = cluster.prefill.attempts[0]
    for who in (cluster.prefill, cluster.decode):
        who.tokens(attempt, 2, [7])
        who.says(started=wire.Started(attempt=attempt))
        who.says(resident=wire.Resident(attempt=attempt, handoff=1))
        who.says(ended=wire.Ended(attempt=b"x" * 16, reason=gen.FINISH_REASON_EOS))
        who.says(freed=wire.Freed(attempt=attempt))
        who.says(handoff_failed=refused("EXPIRED", attempt=attempt, handoff=1))
    await cluster.until(lambda: cluster.counted("late_messages") >= 12)
    assert ids_of(await cluster.generate()) == cluster.answer
    await cluster.idle()


async def test_a_late_failure_of_an_older_handoff_is_dropped(cluster: Cluster) -> None:
    gate = cluster.decode.gate("step 1")
    cluster.prefill.refusals = [refused("UNREACHABLE")]
    call = cluster.call()
    await cluster.decode.at("step 1")
    attempt = cluster.prefill.attempts[0]
    cluster.prefill.says(handoff_failed=refused("UNREACHABLE", attempt=attempt, handoff=1))
    cluster.decode.says(resident=wire.Resident(attempt=attempt, handoff=1))
    await cluster.until(lambda: cluster.counted("late_handoff_failed") == 1)
    gate.set()
    assert ids_of([event async for event in call]) == cluster.answer


async def test_success_that_its_failure_overtook_is_taken_back(cluster: Cluster) -> None:
    """The prefill worker lost the answer to its commit; the decode worker has the sequence all the same."""
    gate = cluster.decode.gate("received")
    call = cluster.call()
    await cluster.decode.at("received")
    attempt = cluster.prefill.attempts[0]
    failed = refused("UNREACHABLE", attempt=attempt, handoff=1, retry_after_ms=5000.0)
    cluster.prefill.says(handoff_failed=failed)
    await cluster.until(lambda: cluster.counted("handoffs_failed_unreachable") == 1)
    gate.set()
    assert ids_of([event async for event in call]) == cluster.answer
    assert cluster.counted("handoffs_readopted") == 1
    assert cluster.prefill.count("bind") == 1
    await cluster.idle()


async def test_a_handoff_that_failed_after_it_succeeded_frees_the_prefill_worker(cluster: Cluster) -> None:
    gate = cluster.decode.gate("step 1")
    call = cluster.call()
    await cluster.decode.at("step 1")
    attempt = cluster.prefill.attempts[0]
    await cluster.until(lambda: cluster.counted("late_handoff_failed") == 0)
    cluster.prefill.says(handoff_failed=refused("UNREACHABLE", attempt=attempt, handoff=1))
    await cluster.until(lambda: cluster.prefill.cancelled == [attempt])
    gate.set()
    assert ids_of([event async for event in call]) == cluster.answer
    assert not cluster.decode.cancelled


async def test_an_error_of_a_worker_ends_the_stream_with_it(cluster: Cluster) -> None:
    cluster.decode.gate("step 2")
    call = cluster.call()
    await cluster.decode.at("step 2")
    code = grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
    cluster.decode.says(ended=wire.Ended(attempt=cluster.decode.attempts[0], status=code, message="out of blocks"))
    error = await error_of(call)
    assert isinstance(error, ResourceExhausted)
    assert "out of blocks" in str(error)
    await cluster.idle()
