"""Workers that are lost, and streams that only break."""

from __future__ import annotations

import asyncio

import pytest

from baton.errors import Unavailable
from baton.v1 import worker_pb2 as wire
from router.workers import link as worker_link
from tests.router.conftest import Cluster, error_of, ids_of, refused, text_of

# Lost workers.


async def test_a_lost_decode_worker_ends_its_streams_where_no_other_is_left(cluster: Cluster) -> None:
    call = cluster.call()
    cluster.decode.gate("step 2")
    await cluster.decode.at("step 2")
    started = asyncio.get_running_loop().time()
    await cluster.decode.stop()
    error = await error_of(call)
    assert asyncio.get_running_loop().time() - started < 1.0
    assert isinstance(error, Unavailable)
    assert "d0" in str(error)
    assert error.retry_after_s
    await cluster.idle()


async def test_a_lost_prefill_worker_ends_what_it_still_holds_where_no_other_is_left(cluster: Cluster) -> None:
    gate = cluster.decode.gate("step 2")
    decoding = cluster.call()
    await cluster.decode.at("step 2")
    await cluster.until(lambda: cluster.counted("late_messages") == 0)
    cluster.prefill.gate("started")
    cluster.prefill.reached.clear()
    computing = cluster.call()
    await cluster.prefill.at("started")
    cluster.router.placer.path = "disaggregated"  # or it would go on in place
    await cluster.prefill.stop()
    error = await error_of(computing)
    assert isinstance(error, Unavailable)
    assert "p0" in str(error)
    gate.set()
    assert ids_of([event async for event in decoding]) == cluster.answer
    await cluster.idle()


async def test_a_worker_whose_pieces_make_no_frame_is_lost(cluster: Cluster) -> None:
    """A message is lost with them, so nothing that the worker says can be relied on."""
    cluster.decode.gate("step 2")
    call = cluster.call()
    await cluster.decode.at("step 2")
    cluster.decode.says(fragment=wire.Fragment(message_id=9, data=b"\xff", last=True))
    error = await error_of(call)
    assert isinstance(error, Unavailable)
    assert "message 9 are no WorkerFrame" in str(error)
    assert not cluster.usable("d0")
    await cluster.idle()


async def test_a_lost_worker_that_was_only_bound_is_replaced(cluster: Cluster) -> None:
    gate = cluster.prefill.gate("bound")
    call = cluster.call()
    await cluster.prefill.at("bound")
    await cluster.add("d1", "decode")
    await cluster.decode.stop()
    await cluster.until(lambda: cluster.prefill.count("bind") == 2)
    cluster.prefill.refusals = [refused("UNREACHABLE")]
    gate.set()
    events = [event async for event in call]
    assert ids_of(events) == cluster.answer
    assert events[-1].finished.timeline.decode_worker == "d1"
    await cluster.idle()


async def test_nobody_left_is_said_at_once(empty: Cluster) -> None:
    for role in ("", "prefill"):
        if role:
            await empty.add("p0", "prefill")
        error = await error_of(empty.call())
        assert isinstance(error, Unavailable)
        assert error.retry_after_s


# Broken streams.


async def test_a_stream_taken_up_again_loses_no_token(cluster: Cluster) -> None:
    gate = cluster.decode.gate("step 2")
    call = cluster.call()
    await cluster.decode.at("step 2")
    await cluster.until(lambda: cluster.usable("d0"))
    cluster.decode.break_stream()
    gate.set()  # it goes on while nobody listens
    events = [event async for event in call]
    assert ids_of(events) == cluster.answer
    assert text_of(events) == "Paris is the capital"
    assert cluster.decode.greetings == [False, True]
    await cluster.idle()


async def test_a_command_survives_a_broken_stream(cluster: Cluster) -> None:
    cluster.prefill.break_stream()
    await cluster.until(lambda: len(cluster.prefill.greetings) == 2 and cluster.usable("p0"))
    cluster.prefill.break_stream()
    await cluster.until(lambda: not cluster.usable("p0"))
    assert ids_of(await cluster.generate()) == cluster.answer  # what is placed on it meanwhile waits for the stream
    assert cluster.prefill.greetings == [False, True, True]


async def test_a_broken_stream_does_not_keep_a_prompt_from_being_bound(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_link, "RETRY_S", 0.3)
    gate = cluster.prefill.gate("queued")
    call = cluster.call()
    await cluster.prefill.at("queued")
    cluster.decode.break_stream()
    await cluster.until(lambda: not cluster.usable("d0"))
    gate.set()
    assert ids_of([event async for event in call]) == cluster.answer
    assert cluster.decode.greetings == [False, True]


async def test_a_worker_that_forgot_the_session_is_lost(cluster: Cluster) -> None:
    cluster.decode.gate("step 1")
    call = cluster.call()
    await cluster.decode.at("step 1")
    cluster.decode.session = None
    cluster.decode.break_stream()
    error = await error_of(call)
    assert "session" in str(error)


async def test_a_stream_that_stays_away_is_lost_after_the_grace_time(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_link, "GRACE_S", 0.2)
    monkeypatch.setattr(worker_link, "HELLO_S", 0.1)
    hang = asyncio.Event()

    async def silent(request_iterator: object, context: object) -> None:
        await hang.wait()

    cluster.decode.gate("step 1")
    call = cluster.call()
    await cluster.decode.at("step 1")
    cluster.decode.on_attach = silent
    cluster.decode.break_stream()
    error = await error_of(call)
    hang.set()
    assert "no stream for" in str(error)
