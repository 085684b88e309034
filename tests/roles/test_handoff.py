"""Handoffs that are refused, and pairs that can't work together."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest

from baton.rpc.convert import layout_to_wire
from baton.v1 import transfer_pb2
from baton.v1 import worker_pb2 as wire
from decode_worker.transfer import TransferService
from decode_worker.writer_streams import WriterStream
from tests.roles.conftest import Cluster
from tests.roles.counting import LAYOUT
from tests.roles.node import stranger
from tests.roles.scripted import ScriptedRouter
from tests.rpc.waiting import until

BLOCK = LAYOUT.block_tokens
SLOW_S = 100
"""Longer than any test waits, so that nothing hangs on how fast it runs."""


def reason(message: Any) -> str:
    return wire.RefusalReason.Name(message.reason).removeprefix("REFUSAL_REASON_")


async def refused(cluster: Cluster, spec: Any, count: int = 1) -> Any:
    """The `count`-th HandoffFailed."""
    failed = await cluster.router.hears(cluster.p, "handoff_failed", spec, count)
    assert failed.handoff == count
    return failed


async def test_without_room_it_waits_and_is_granted_when_there_is_some(cluster: Cluster) -> None:
    await cluster.add_prefill()
    await cluster.add_decode(blocks=6)
    first, second = cluster.router.spec(4 * BLOCK, max_tokens=BLOCK), cluster.router.spec(2 * BLOCK, max_tokens=3)
    cluster.d.engine.gate.clear()
    await cluster.bound(first)
    await cluster.router.hears(cluster.d, "resident", first)
    await cluster.bound(second)
    waiting = await cluster.router.hears(cluster.p, "handoff_waiting", second)
    assert (waiting.handoff, waiting.ahead) == (1, 0)
    assert cluster.d.role.live["handoffs_waiting"] == 1
    cluster.d.engine.gate.set()
    await cluster.finished(first)
    await cluster.finished(second)
    assert cluster.router.heard(cluster.d, "resident", second)[0].handoff == 1


async def test_the_decode_worker_knows_how_long_ago_the_first_token_came(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its steps count from there, so a slow way is made good; two such, and it is reckoned with beforehand."""
    take, ages = TransferService._take, list[int]()

    def slower(service: TransferService, stream: WriterStream, frame: transfer_pb2.SenderFrame) -> None:
        if frame.WhichOneof("body") == "commit":
            ages.append(frame.commit.first_token_age_us)
            frame.commit.first_token_age_us += SLOW_S * 1_000_000
        take(service, stream, frame)

    monkeypatch.setattr(TransferService, "_take", slower)
    await cluster.add_prefill()
    await cluster.add_decode()
    scheduler = cluster.d.role.handoffs._scheduler
    for number in (1, 2):
        spec = cluster.router.spec(4 * BLOCK, max_tokens=3)
        cluster.d.engine.gate.clear()
        before = time.monotonic()
        await cluster.bound(spec)
        await cluster.router.hears(cluster.d, "resident", spec)
        await until(lambda spec=spec: spec.attempt in scheduler._residents, "its first step")  # type: ignore[misc]
        first_token_at = scheduler._residents[spec.attempt].first_token_at
        assert first_token_at is not None
        assert before <= first_token_at + SLOW_S <= time.monotonic(), "not when it came here"
        cluster.d.engine.gate.set()
        await cluster.finished(spec)
        assert (scheduler.handoff_s >= SLOW_S) is (number == 2)
    assert all(0 < age < SLOW_S * 1_000_000 for age in ages), "what the prefill worker said"


async def test_an_engine_at_rest_is_woken_before_a_sequence_arrives(cluster: Cluster) -> None:
    """When its room is granted and again as its blocks come in; not where a resident keeps the engine awake."""
    await cluster.add_prefill()
    await cluster.add_decode()
    first, second = cluster.router.spec(4 * BLOCK, max_tokens=3), cluster.router.spec(2 * BLOCK, max_tokens=3)
    cluster.p.engine.gate.clear()
    await cluster.bound(first)
    await until(lambda: cluster.d.engine.woken)
    assert len(set(cluster.d.engine.woken[0])) == 5, "the whole sequence's blocks"
    assert not cluster.router.heard(cluster.d, "resident", first)
    cluster.d.engine.gate.clear()
    cluster.p.engine.gate.set()
    await cluster.router.hears(cluster.d, "resident", first)
    before = len(cluster.d.engine.woken)
    await cluster.bound(second)
    await cluster.router.hears(cluster.d, "resident", second)
    cluster.d.engine.gate.set()
    await cluster.finished(first)
    await cluster.finished(second)
    assert len(cluster.d.engine.woken) == before


async def test_no_sequence_slot(cluster: Cluster) -> None:
    await cluster.add_prefill()
    await cluster.add_decode(max_sequences=1)
    first, second = cluster.router.spec(5, max_tokens=5), cluster.router.spec(5, max_tokens=5)
    cluster.d.engine.gate.clear()
    await cluster.bound(first)
    await cluster.router.hears(cluster.d, "resident", first)
    await cluster.bound(second)
    await cluster.router.hears(cluster.p, "handoff_waiting", second)
    cluster.d.engine.gate.set()
    await cluster.finished(first)
    await cluster.finished(second)


async def test_refused_while_computing_and_bound_to_another(cluster: Cluster) -> None:
    """Computing goes on meanwhile; the other decode worker gets everything."""
    await cluster.add_prefill()
    await cluster.add_decode(blocks=2)
    other = await cluster.add_decode("d1")
    spec = cluster.router.spec(6 * BLOCK, max_tokens=4)
    cluster.p.engine.gate.clear()
    await cluster.bound(spec)
    failed = await refused(cluster, spec)
    assert reason(failed) == "TOO_LARGE"
    assert "7 blocks, the pool has 2" in failed.message
    assert not failed.HasField("retry_after_ms")
    cluster.router.bind(cluster.p, spec, other, 2)
    cluster.p.engine.gate.set()
    await cluster.router.hears(other, "ended", spec)
    assert cluster.router.output(spec) == cluster.router.expected(spec)


async def test_a_refused_sequence_can_still_be_cancelled(cluster: Cluster) -> None:
    await cluster.add_prefill()
    await cluster.add_decode(blocks=2)
    spec = cluster.router.spec(6 * BLOCK)
    await cluster.bound(spec)
    await refused(cluster, spec)
    cluster.router.cancel(cluster.p, spec)
    await cluster.router.hears(cluster.p, "freed", spec)
    await cluster.idle()


async def test_unknown_router(pair: Cluster) -> None:
    """The decode worker has no stream to the router that would get the tokens."""
    spec = pair.router.spec(20, router=stranger())
    await pair.bound(spec)
    failed = await refused(pair, spec)
    assert reason(failed) == "UNKNOWN_ROUTER"
    assert "stranger" in failed.message
    pair.router.cancel(pair.p, spec)


async def test_the_same_router_in_another_incarnation_is_unknown(pair: Cluster) -> None:
    spec = pair.router.spec(20, router=replace(pair.router.process, incarnation="older"))
    await pair.bound(spec)
    assert reason(await refused(pair, spec)) == "UNKNOWN_ROUTER"
    pair.router.cancel(pair.p, spec)


def _says(**changes: Any) -> dict[str, Any]:
    return {"kv_layout": layout_to_wire(replace(LAYOUT, **changes))}


@pytest.mark.parametrize(
    ("says", "message"),
    [
        (_says(head_dim=8), "kv_layout.head_dim differs: here 8, there 4"),
        (_says(dtype="float16"), "kv_layout.dtype differs: here float16, there float32"),
        (_says(dtype="int8"), "kv_layout.dtype differs: here int8, there float32"),
        (_says(block_tokens=32), "kv_layout.block_tokens differs: here 32, there 16"),
        ({"kv_layout": wire.KvLayout(version=1)}, "kv_layout differs: here layers must be at least 1, not 0"),
        ({"fingerprint": "other"}, f"fingerprint differs: here other, there {'f' * 32}"),
        ({"version_min": 2, "version_max": 3}, "version differs: here 2 to 3, there 1"),
        ({"checksums": False}, "checksums differs: here false, there true"),
        ({"tcp_tls": True}, "tcp_tls differs: here true, there false"),
        ({"transports": ["nccl"]}, "transports differs: here nccl, there memory"),
    ],
)
async def test_a_mismatch_names_the_field_and_both_values(pair: Cluster, says: dict[str, Any], message: str) -> None:
    pair.p.says(**says)
    spec = pair.router.spec(20)
    await pair.bound(spec)
    failed = await refused(pair, spec)
    assert reason(failed) == "MISMATCH"
    assert message in failed.message
    assert "d0" in failed.message
    pair.p.says()  # as if that worker had been replaced: nothing is remembered against the pair
    pair.router.bind(pair.p, spec, pair.d, 2)
    await pair.finished(spec)


async def test_versions_are_a_range(pair: Cluster) -> None:
    pair.p.says(version_min=0, version_max=9)
    await pair.serve(pair.router.spec(20))


async def test_shared_memory_is_not_offered_to_another_host(cluster: Cluster) -> None:
    await cluster.add_prefill(kind="shm")
    await cluster.add_decode(kind="shm")
    cluster.p.says(host="elsewhere")
    spec = cluster.router.spec(20)
    await cluster.bound(spec)
    assert "host differs: here elsewhere, there " in (await refused(cluster, spec)).message
    cluster.router.cancel(cluster.p, spec)


async def test_another_incarnation_at_the_address(pair: Cluster) -> None:
    spec = pair.router.spec(20)
    await pair.started(spec)
    pair.router.bind(pair.p, spec, replace(pair.d.process, incarnation="former"))
    failed = await refused(pair, spec)
    assert reason(failed) == "UNREACHABLE"
    assert "restarted" in failed.message
    pair.router.bind(pair.p, spec, pair.d, 2)
    await pair.finished(spec)


@pytest.mark.parametrize("address", ["127.0.0.1:1", "", "nonsense"])
async def test_nobody_there(pair: Cluster, address: str) -> None:
    spec = pair.router.spec(20)
    await pair.started(spec)
    pair.router.bind(pair.p, spec, replace(stranger(), address=address))
    assert reason(await refused(pair, spec)) == "UNREACHABLE"
    pair.router.bind(pair.p, spec, pair.d, 2)
    await pair.finished(spec)


async def test_no_grant_within_the_deadline(cluster: Cluster) -> None:
    """A decode worker that takes the stream and says nothing."""
    await cluster.add_prefill(handoff_deadline_s=0.3)
    await cluster.add_decode()
    held: list[Any] = []
    cluster.d.transfer._open = lambda stream, message: held.append((stream, message))  # type: ignore[method-assign]
    spec = cluster.router.spec(20)
    await cluster.bound(spec)
    failed = await refused(cluster, spec)
    assert reason(failed) == "EXPIRED"
    assert "no grant from d0 within 0.3 s" in failed.message
    del cluster.d.transfer._open
    cluster.d.transfer._open(*held[0])  # the late grant is closed again
    await until(lambda: not cluster.d.busy(), "the late grant closed")
    cluster.router.bind(cluster.p, spec, cluster.d, 2)
    await cluster.finished(spec)


async def test_no_answer_to_the_commit_within_the_deadline(cluster: Cluster) -> None:
    await cluster.add_prefill(handoff_deadline_s=0.3)
    await cluster.add_decode()
    cluster.d.transfer._commit = lambda stream, message: None  # type: ignore[method-assign]
    spec = cluster.router.spec(20)
    await cluster.bound(spec)
    failed = await refused(cluster, spec)
    assert reason(failed) == "EXPIRED"
    assert "no answer to the commit" in failed.message
    await until(lambda: not cluster.d.busy(), "the close")
    del cluster.d.transfer._commit
    cluster.router.bind(cluster.p, spec, cluster.d, 2)
    await cluster.finished(spec)


async def test_a_computed_prompt_is_not_held_for_ever(pair: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prefill_worker.running.HOLD_S", 0.1)
    spec = pair.router.spec(20)
    await pair.started(spec)
    ended = await pair.router.hears(pair.p, "ended", spec)
    assert ended.status == 8  # RESOURCE_EXHAUSTED
    assert "no decode worker took it" in ended.message


async def test_routers_are_told_apart(pair: Cluster) -> None:
    other = ScriptedRouter("other")
    await other.attach(pair.p, pair.d)
    try:
        mine, theirs = pair.router.spec(30, max_tokens=9), other.spec(30, max_tokens=9)
        for router, spec in ((pair.router, mine), (other, theirs)):
            router.prefill(pair.p, spec)
            await router.hears(pair.p, "started", spec)
            router.bind(pair.p, spec, pair.d)
        await pair.finished(mine)
        await other.hears(pair.d, "ended", theirs)
        assert other.output(theirs) == other.expected(theirs)
        assert pair.router.tokens(pair.d, theirs) == {}
    finally:
        await other.stop()
