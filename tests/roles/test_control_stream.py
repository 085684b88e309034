"""The control stream of a pair breaks: handoffs fail, the same pair is bound again, and no grant stays behind."""

from __future__ import annotations

import asyncio

import pytest

from baton.rpc.convert import spec_to_wire
from baton.spec import HandoffKey
from baton.v1 import transfer_pb2
from baton.v1 import worker_pb2 as wire
from kvtransfer.handoffs.delivery import DeliveryState
from kvtransfer.handoffs.outcomes import GrantState
from tests.roles.conftest import Cluster
from tests.roles.test_cancel import StalledWrite
from tests.rpc.waiting import until

UNREACHABLE = wire.REFUSAL_REASON_UNREACHABLE


@pytest.mark.parametrize("kind", ["memory", "shm", "tcp"])
async def test_control_stream_broken_while_computing(cluster: Cluster, kind: str) -> None:
    """The handoff fails; the same pair is bound again, and the first grant does not stay."""
    await cluster.add_prefill(kind=kind)
    await cluster.add_decode(kind=kind)
    cluster.p.engine.gate.clear()
    spec = cluster.router.spec(80, max_tokens=4)
    await cluster.bound(spec)
    await until(lambda: cluster.d.role.live["grants"], "the grant")
    cluster.d.break_control_streams()
    failed = await cluster.router.hears(cluster.p, "handoff_failed", spec)
    assert failed.reason == UNREACHABLE
    cluster.router.bind(cluster.p, spec, cluster.d, 2)
    await until(lambda: cluster.d.role.live["aborting"] == 0 < cluster.d.role.live["grants"], "only the new grant")
    cluster.p.engine.gate.set()
    await cluster.finished(spec)


async def test_control_stream_broken_mid_write(cluster: Cluster) -> None:
    """The write is on its thread when the stream breaks: the quarantine lasts until it has returned, then the close
    that is owed ends it."""
    await cluster.add_prefill(kind="shm")
    await cluster.add_decode(kind="shm")
    await cluster.serve(cluster.router.spec(3))
    spec = cluster.router.spec(40, max_tokens=4)
    with StalledWrite(cluster) as stalled:
        await cluster.bound(spec)
        await until(stalled.entered.is_set, "the write")
        cluster.d.break_control_streams()
        await cluster.router.hears(cluster.p, "handoff_failed", spec)
        cluster.router.bind(cluster.p, spec, cluster.d, 2)
        await until(lambda: cluster.d.role.live["aborting"], "the first grant given up")
        assert cluster.d.pool.statistics().quarantined == 3
        stalled.go_on.set()
        await cluster.finished(spec)


async def test_a_close_that_was_lost_is_asked_for_again(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    await cluster.add_prefill(kind="shm")
    await cluster.add_decode(kind="shm")
    cluster.p.engine.gate.clear()
    spec = cluster.router.spec(80)
    await cluster.bound(spec)
    await until(lambda: cluster.d.role.live["grants"], "the grant")
    lost: list[object] = []
    with monkeypatch.context() as patch:
        patch.setattr(cluster.d.role.handoffs, "closed", lost.append)
        cluster.router.cancel(cluster.d, spec)
        cluster.router.cancel(cluster.p, spec)
        await until(lambda: lost, "the close")
        cluster.d.break_control_streams()
        await until(lambda: not len(cluster.d.streams), "the end of the stream that all closes were lost on")
        assert cluster.d.role.live["aborting"] == 1
        assert cluster.router.heard(cluster.d, "freed", spec) == []
    cluster.p.engine.gate.set()
    await cluster.serve(cluster.router.spec(5))
    await cluster.router.hears(cluster.d, "freed", spec)


async def test_a_close_that_was_lost_with_its_stream_is_said_again(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a later bind to that worker the blocks come back all the same."""
    await cluster.add_prefill(kind="shm")
    await cluster.add_decode(kind="shm")
    cluster.p.engine.gate.clear()
    spec = cluster.router.spec(80)
    await cluster.bound(spec)
    await until(lambda: cluster.d.role.live["grants"], "the grant")
    lost: list[object] = []
    with monkeypatch.context() as patch:
        patch.setattr(cluster.d.role.handoffs, "closed", lost.append)
        cluster.router.cancel(cluster.d, spec)
        await until(lambda: lost, "the close")
    assert cluster.d.pool.statistics().quarantined == 5
    cluster.d.break_control_streams()
    await cluster.router.hears(cluster.d, "freed", spec)
    assert cluster.d.pool.statistics().quarantined == 0
    cluster.router.cancel(cluster.p, spec)
    cluster.p.engine.gate.set()


async def test_closes_that_were_heard_are_forgotten(cluster: Cluster) -> None:
    await cluster.add_prefill()
    await cluster.add_decode(lease_s=0.3)
    for _ in range(3):
        cluster.p.engine.gate.clear()
        spec = cluster.router.spec(80)
        await cluster.bound(spec)
        await until(lambda: cluster.d.role.live["grants"], "the grant")
        cluster.router.cancel(cluster.p, spec)
        cluster.p.engine.gate.set()
        await cluster.router.hears(cluster.p, "freed", spec)
        (sender,) = cluster.p.role.senders
        number = max(number for number, _ in sender._said.values())
        assert len(sender._said) == 1
        stream = sender._stream
        await until(lambda number=number, stream=stream: stream.heard > number, "a renewal")  # type: ignore[misc]
    cluster.d.break_control_streams()
    await until(lambda: not sender._said, "the break")
    assert not sender.has_business


async def test_a_token_drawn_while_the_stream_is_coming_down(pair: Cluster) -> None:
    """Between the break and its report nothing is sent, and no token of another sequence is lost."""
    pair.p.engine.gate.clear()
    first, second = pair.router.spec(10, max_tokens=3), pair.router.spec(10, max_tokens=3)
    await pair.bound(first)
    await pair.bound(second)
    await until(lambda: pair.d.role.live["grants"] == 2, "the grants")
    (sender,) = pair.p.role.senders
    sender._stream.up = False
    pair.p.engine.gate.set()
    for spec in (first, second):
        await until(lambda spec=spec: pair.router.tokens(pair.p, spec), "the first token")  # type: ignore[misc]
    await until(lambda: not pair.writing(), "the writes")
    states = {outbound.delivery.state for outbound in sender._outbound.values()}
    assert states == {DeliveryState.DELIVERING}
    sender._stream.up = True
    for outbound in list(sender._outbound.values()):
        sender.advance(outbound)
    await pair.finished(first)
    await pair.finished(second)


async def test_what_is_left_on_the_former_stream_is_dropped(pair: Cluster) -> None:
    await pair.serve(pair.router.spec(3))
    (former,) = pair.d.streams
    pair.d.break_control_streams()
    await until(lambda: not len(pair.d.streams), "the break")
    await pair.serve(pair.router.spec(3))
    assert list(pair.d.streams) != [former]
    spec = pair.router.spec(20)
    message = transfer_pb2.OpenRequest(attempt=spec.attempt, handoff=1, spec=spec_to_wire(spec), transport="memory")
    pair.d.transfer._take(former, transfer_pb2.SenderFrame(open=message))
    assert pair.d.count("late_messages") == 1
    assert pair.d.role.live["grants"] == 0


async def test_pieces_that_make_no_frame_end_the_stream(pair: Cluster) -> None:
    """The writer hears why; its handoffs fail, and the same pair goes on with the next."""
    await pair.serve(pair.router.spec(3))
    pair.p.engine.gate.clear()
    spec = pair.router.spec(80, max_tokens=4)
    await pair.bound(spec)
    await until(lambda: pair.d.role.live["grants"], "the grant")
    (sender,) = pair.p.role.senders
    sender._stream.send(fragment=wire.Fragment(message_id=5, data=b"\xff", last=True))
    failed = await pair.router.hears(pair.p, "handoff_failed", spec)
    assert failed.reason == UNREACHABLE
    assert "message 5 are no SenderFrame" in failed.message
    pair.p.engine.gate.set()
    pair.router.bind(pair.p, spec, pair.d, 2)
    await pair.finished(spec)


async def test_freed_is_said_once_all_handoffs_are_over(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    await cluster.add_prefill(kind="shm")
    await cluster.add_decode(kind="shm")
    cluster.p.engine.gate.clear()
    spec = cluster.router.spec(80)
    first, second = HandoffKey(spec.attempt, 1), HandoffKey(spec.attempt, 2)
    role, held = cluster.d.role, list[HandoffKey]()
    closed = role.handoffs.closed
    monkeypatch.setattr(role.handoffs, "closed", held.append)
    await cluster.bound(spec)
    await until(lambda: role.ledger.state(first), "the first grant")
    cluster.router.bind(cluster.p, spec, cluster.d, 2)
    await until(lambda: role.ledger.state(second), "the second grant")
    assert role.ledger.state(first) is GrantState.ABORTING
    cluster.router.cancel(cluster.p, spec)
    cluster.router.cancel(cluster.d, spec)
    await until(lambda: {first, second} <= set(held) and role.live["aborting"] == 2, "both given up and closed")
    closed(second)
    await asyncio.sleep(0.02)
    assert cluster.router.heard(cluster.d, "freed", spec) == []
    closed(first)
    await cluster.router.hears(cluster.d, "freed", spec)
    await asyncio.sleep(0.02)
    assert len(cluster.router.heard(cluster.d, "freed", spec)) == 1
