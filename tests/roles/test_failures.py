"""Streams that break, processes that go, writes that fail: everything is freed, and what can go on does."""

from __future__ import annotations

from typing import Any

import pytest

from baton.v1 import worker_pb2 as wire
from tests.roles.conftest import Cluster
from tests.roles.counting import LAYOUT
from tests.roles.test_cancel import StalledWrite
from tests.rpc.waiting import until

BLOCK = LAYOUT.block_tokens
UNREACHABLE = wire.REFUSAL_REASON_UNREACHABLE


@pytest.fixture
def short_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("baton.worker.service.GRACE_S", 0.1)


async def at_every_point(cluster: Cluster) -> list[Any]:
    """One request waits, one computes, one is computed, one transfers, one is resident."""
    specs = [cluster.router.spec(20, max_tokens=300) for _ in range(5)]
    resident, moving, computed, computing, waiting = specs
    cluster.d.engine.gate.clear()
    await cluster.bound(resident)
    await cluster.router.hears(cluster.d, "resident", resident)
    await cluster.router.hears(cluster.p, "prefill_report", resident)
    cluster.faults().flowing.clear()
    await cluster.bound(moving)
    await until(cluster.writing, "the write")
    await cluster.started(computed)
    await until(lambda: cluster.router.tokens(cluster.p, computed), "its first token")
    cluster.p.engine.gate.clear()
    await cluster.started(computing)
    cluster.router.prefill(cluster.p, waiting)
    await until(lambda: cluster.p.busy().get("attempts") == 4, "all there")
    return specs


async def test_router_lost(cluster: Cluster, short_grace: None) -> None:
    await cluster.add_prefill(max_ungranted=2)
    await cluster.add_decode()
    await at_every_point(cluster)
    await cluster.router.stop()
    await until(lambda: cluster.p.count("routers_lost") and cluster.d.count("routers_lost"), "both noticed")
    cluster.faults().flowing.set()
    cluster.p.engine.gate.set()
    cluster.d.engine.gate.set()
    await cluster.idle()
    assert cluster.p.worker.sessions == cluster.d.worker.sessions == []


async def test_a_broken_router_stream_loses_nothing(cluster: Cluster) -> None:
    await cluster.add_prefill()
    await cluster.add_decode()
    spec = cluster.router.spec(100, max_tokens=40)
    await cluster.bound(spec)
    for _ in range(3):
        for node in (cluster.p, cluster.d):
            await cluster.router.links[node.name].detach()
            await cluster.router.links[node.name].attach()
    await cluster.finished(spec)
    assert all(link.resumed == [False, True, True, True] for link in cluster.router.links.values())


async def test_write_fails_and_the_pair_is_bound_again(pair: Cluster) -> None:
    """A torn connection blacklists no worker."""
    await pair.serve(pair.router.spec(3))
    pair.faults().tear_after = 1
    spec = pair.router.spec(60, max_tokens=4)
    await pair.bound(spec)
    failed = await pair.router.hears(pair.p, "handoff_failed", spec)
    assert failed.reason == UNREACHABLE
    assert "broke in the middle" in failed.message
    pair.faults().tear_after = None
    pair.router.bind(pair.p, spec, pair.d, 2)
    await pair.finished(spec)


async def test_a_stalled_write_ends_at_the_deadline(cluster: Cluster) -> None:
    await cluster.add_prefill(handoff_deadline_s=0.3)
    await cluster.add_decode()
    await cluster.serve(cluster.router.spec(3))
    cluster.faults().flowing.clear()
    spec = cluster.router.spec(60, max_tokens=4)
    await cluster.bound(spec)
    failed = await cluster.router.hears(cluster.p, "handoff_failed", spec)
    assert "did not end in time" in failed.message
    cluster.faults().flowing.set()
    cluster.router.bind(cluster.p, spec, cluster.d, 2)
    await cluster.finished(spec)


async def test_decode_process_gone(cluster: Cluster) -> None:
    await cluster.add_prefill()
    await cluster.add_decode()
    other = await cluster.add_decode("d1")
    spec = cluster.router.spec(60, max_tokens=4)
    cluster.p.engine.gate.clear()
    await cluster.bound(spec)
    await until(lambda: cluster.d.role.live["grants"], "the grant")
    await cluster.d.die()
    failed = await cluster.router.hears(cluster.p, "handoff_failed", spec)
    assert failed.reason == UNREACHABLE
    cluster.router.bind(cluster.p, spec, other, 2)
    cluster.p.engine.gate.set()
    await cluster.router.hears(other, "ended", spec)
    assert cluster.router.output(spec) == cluster.router.expected(spec)
    await until(lambda: cluster.p.role.live["deliveries"] == 0, "nothing under way")
    cluster.d.role.on_router_lost(cluster.d.worker.sessions[0])  # the dead one's books are of no interest


async def test_prefill_process_gone_before_and_after_resident(cluster: Cluster) -> None:
    """What was only granted is freed; the resident goes on."""
    await cluster.add_prefill()
    await cluster.add_decode()
    resident, granted = cluster.router.spec(20, max_tokens=50), cluster.router.spec(60)
    cluster.d.engine.gate.clear()
    await cluster.bound(resident)
    await cluster.router.hears(cluster.d, "resident", resident)
    await cluster.router.hears(cluster.p, "prefill_report", resident)
    cluster.p.engine.gate.clear()
    await cluster.bound(granted)
    await until(lambda: cluster.d.role.live["grants"], "the grant")
    await cluster.p.die()
    await until(lambda: not cluster.d.role.live["grants"], "the grant freed")
    cluster.d.engine.gate.set()
    await cluster.finished(resident)
    cluster.p.role.on_router_lost(cluster.p.worker.sessions[0])
    cluster.p.engine.gate.set()


async def test_a_lease_that_is_not_renewed(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """The grant ends with it, but its blocks are free only after the writer's proof."""
    monkeypatch.setattr("decode_worker.handoffs.DecodeHandoffs.renew", lambda self, writer: None)
    await cluster.add_prefill(kind="shm")
    await cluster.add_decode(kind="shm", lease_s=0.4)
    monkeypatch.setattr("baton.worker.sending.sender.Sender._not_here", lambda self, key: None)
    cluster.p.engine.gate.clear()
    spec = cluster.router.spec(60, max_tokens=4)
    closes: list[object] = []
    closed = cluster.d.role.handoffs.closed
    with monkeypatch.context() as patch:
        patch.setattr(cluster.d.role.handoffs, "closed", closes.append)
        await cluster.bound(spec)
        await until(lambda: cluster.d.role.live["grants"], "the grant")
        failed = await cluster.router.hears(cluster.p, "handoff_failed", spec)
        assert failed.reason == wire.REFUSAL_REASON_EXPIRED
        assert "lease ran out" in failed.message
        await until(lambda: closes, "the close")
        assert cluster.d.pool.statistics().quarantined == 4
    for key in closes:
        closed(key)  # type: ignore[arg-type]
    assert cluster.d.pool.statistics().quarantined == 0
    cluster.router.cancel(cluster.p, spec)
    cluster.p.engine.gate.set()


async def test_renewed_leases_outlive_their_first_end(cluster: Cluster) -> None:
    await cluster.add_prefill()
    await cluster.add_decode(lease_s=0.4)
    cluster.p.engine.gate.clear()
    spec = cluster.router.spec(60, max_tokens=4)
    renewals: list[str] = []
    renew = cluster.d.role.handoffs.renew
    cluster.d.role.handoffs.renew = lambda writer: renewals.append(writer) or renew(writer)  # type: ignore[method-assign,func-returns-value]
    await cluster.bound(spec)
    await until(lambda: len(renewals) >= 6, "renewals")
    cluster.p.engine.gate.set()
    await cluster.finished(spec)
    assert cluster.router.heard(cluster.p, "handoff_failed", spec) == []


async def test_a_write_that_ends_after_a_rebind_elsewhere(cluster: Cluster) -> None:
    """The news goes to the former worker; the commit to the new one."""
    await cluster.add_prefill()
    await cluster.add_decode()
    other = await cluster.add_decode("d1")
    await cluster.serve(cluster.router.spec(3))
    spec = cluster.router.spec(60, max_tokens=4)
    with StalledWrite(cluster) as stalled:
        await cluster.bound(spec)
        await until(stalled.entered.is_set, "the write")
        cluster.router.bind(cluster.p, spec, other, 2)
        faults = cluster.network.faults(cluster.p.process.incarnation, other.transport.endpoint())
        faults.flowing.clear()
        await until(lambda: other.role.live["grants"], "the second grant")
        await until(lambda: sum(sender.writes > 0 for sender in cluster.p.role.senders) == 2, "both")
        stalled.go_on.set()
        await until(lambda: not cluster.d.busy(), "the first is closed")
        faults.flowing.set()
    await cluster.router.hears(other, "ended", spec)
    assert cluster.router.output(spec) == cluster.router.expected(spec)
    assert cluster.router.heard(cluster.p, "handoff_failed", spec) == []
