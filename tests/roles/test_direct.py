"""Prompts that a decode worker computes itself, over the real stream."""

from __future__ import annotations

from typing import Any

import pytest

from baton.spec import Objectives, SequenceSpec
from tests.roles.conftest import Cluster
from tests.roles.counting import LAYOUT
from tests.rpc.waiting import until

BLOCK = LAYOUT.block_tokens


async def ends(cluster: Cluster, spec: SequenceSpec) -> Any:
    """Waits for the end on d0; all tokens came, and are those that the engine must draw."""
    ended = await cluster.router.hears(cluster.d, "ended", spec)
    assert not ended.HasField("status"), ended.message
    assert cluster.router.output(spec) == cluster.router.expected(spec, ended.output_tokens)
    return ended


async def test_a_prompt_is_computed_in_chunks_and_decoded_in_place(cluster: Cluster) -> None:
    await cluster.add_decode(chunk_tokens=32)
    spec = cluster.router.spec(100, max_tokens=5)
    cluster.router.direct(cluster.d, spec)
    ended = await ends(cluster, spec)
    report = await cluster.router.hears(cluster.d, "prefill_report", spec)
    assert len(cluster.router.heard(cluster.d, "started", spec)) == 1
    assert (ended.output_tokens, report.cached_tokens, report.transport) == (5, 0, "")
    assert [batch[0][1] for batch in cluster.d.engine.batches] == [32, 32, 32, 4, 1, 1, 1, 1]


async def test_the_first_token_may_be_all(cluster: Cluster) -> None:
    await cluster.add_decode()
    spec = cluster.router.spec(20, max_tokens=1)
    cluster.router.direct(cluster.d, spec)
    assert (await ends(cluster, spec)).output_tokens == 1


async def test_a_cached_prefix_is_not_computed_again(cluster: Cluster) -> None:
    await cluster.add_decode()
    first = cluster.router.spec(3 * BLOCK + 4, max_tokens=3)
    cluster.router.direct(cluster.d, first)
    await ends(cluster, first)
    again = cluster.router.spec([*first.prompt, 5, 6], max_tokens=3)
    cluster.router.direct(cluster.d, again)
    await ends(cluster, again)
    assert (await cluster.router.hears(cluster.d, "prefill_report", again)).cached_tokens == 3 * BLOCK


async def test_residents_go_on_beside_a_long_prompt(pair: Cluster) -> None:
    resident = pair.router.spec(20, max_tokens=400, objectives=Objectives(tpot_ms=1000.0))
    await pair.bound(resident)
    await until(lambda: len(pair.router.output(resident)) > 2, "some tokens")
    prompt = pair.router.spec(200, max_tokens=3)
    pair.router.direct(pair.d, prompt)
    await ends(pair, prompt)
    await pair.finished(resident)
    mixed = [batch for batch in pair.d.engine.batches if len(batch) == 2 and any(count > 1 for _, count in batch)]
    assert mixed, "the prompt's chunks and the resident's tokens share steps"
    assert all(sum(count == 1 for _, count in batch) >= 1 for batch in mixed)


async def test_cancelled_at_every_point(cluster: Cluster) -> None:
    node = await cluster.add_decode(chunk_tokens=32, max_sequences=2)
    node.engine.gate.clear()
    computing, other, waiting = (cluster.router.spec(40, max_tokens=20) for _ in range(3))
    for spec in (computing, other, waiting):
        cluster.router.direct(node, spec)
    await cluster.router.hears(node, "started", other)
    assert node.role.live["prompts_waiting"] == 1
    for spec in (computing, waiting):
        cluster.router.cancel(node, spec)
    await cluster.router.hears(node, "freed", waiting)
    node.engine.gate.set()
    await cluster.router.hears(node, "freed", computing)
    await until(lambda: len(cluster.router.output(other)) > 1, "its tokens")
    cluster.router.cancel(node, other)
    await cluster.router.hears(node, "freed", other)
    assert not cluster.router.heard(node, "started", waiting)


async def test_what_waits_starts_when_a_slot_comes_free(cluster: Cluster) -> None:
    node = await cluster.add_decode(max_sequences=1)
    specs = [cluster.router.spec(20, max_tokens=3) for _ in range(4)]
    for spec in specs:
        cluster.router.direct(node, spec)
    for spec in specs:
        await ends(cluster, spec)


async def test_what_waits_starts_when_a_grant_is_given_back(cluster: Cluster) -> None:
    """Without a resident no step ends that would look for room: a granted sequence frees room, which must suffice."""
    await cluster.add_prefill()
    node = await cluster.add_decode(blocks=8)
    cluster.p.engine.gate.clear()
    granted, waits = cluster.router.spec(6 * BLOCK, max_tokens=BLOCK), cluster.router.spec(2 * BLOCK, max_tokens=3)
    await cluster.bound(granted)
    await until(lambda: node.busy().get("grants") == 1, "the grant")
    cluster.router.direct(node, waits)
    await until(lambda: node.busy().get("prompts_waiting") == 1, "the prompt")
    for each in (node, cluster.p):
        cluster.router.cancel(each, granted)
    cluster.p.engine.gate.set()
    await ends(cluster, waits)


async def test_what_waits_behind_a_larger_one_starts_when_that_is_cancelled(cluster: Cluster) -> None:
    await cluster.add_prefill()
    node = await cluster.add_decode(blocks=8)
    cluster.p.engine.gate.clear()
    granted = cluster.router.spec(4 * BLOCK, max_tokens=BLOCK)
    large, small = cluster.router.spec(6 * BLOCK, max_tokens=3), cluster.router.spec(BLOCK, max_tokens=3)
    await cluster.bound(granted)
    await until(lambda: node.busy().get("grants") == 1, "the grant")
    for spec in (large, small):
        cluster.router.direct(node, spec)
    await until(lambda: node.busy().get("prompts_waiting") == 2, "both")
    cluster.router.cancel(node, large)
    await ends(cluster, small)
    cluster.p.engine.gate.set()
    await cluster.finished(granted)


async def test_a_cancel_that_overtook_its_prompt_is_remembered(cluster: Cluster) -> None:
    """A prompt that is sent in parts may come behind it."""
    node = await cluster.add_decode()
    spec, other = cluster.router.spec(20, max_tokens=100), cluster.router.spec(20, max_tokens=2)
    cluster.router.cancel(node, spec)
    await cluster.router.hears(node, "freed", spec)
    for each in (spec, other):
        cluster.router.direct(node, each)
    await ends(cluster, other)
    assert node.count("late_messages") == 1
    assert cluster.router.heard(node, "started", spec) == []


async def test_an_urgent_prompt_overtakes_what_waits_and_what_computes(cluster: Cluster) -> None:
    node = await cluster.add_decode(chunk_tokens=32)
    node.engine.gate.clear()
    long = [cluster.router.spec(128, max_tokens=1) for _ in range(3)]
    for spec in long:
        cluster.router.direct(node, spec)
    urgent = cluster.router.spec(16, max_tokens=1, ttft_left_s=1.0)
    cluster.router.direct(node, urgent)
    await cluster.router.hears(node, "started", urgent)
    node.engine.gate.set()
    for spec in (*long, urgent):
        await ends(cluster, spec)
    order = [key for batch in node.engine.batches for key, _ in batch]
    assert order.index(urgent.attempt) <= 2


async def test_a_lost_router_leaves_nothing(cluster: Cluster) -> None:
    node = await cluster.add_decode(max_sequences=1)
    node.engine.gate.clear()
    for _ in range(2):
        cluster.router.direct(node, cluster.router.spec(40, max_tokens=100))
    await until(lambda: node.role.live["residents"] == 1, "one started")
    node.worker.close()
    node.engine.gate.set()
    await until(lambda: not node.busy(), "nothing held")


async def test_what_never_fits_is_refused_by_name(cluster: Cluster) -> None:
    node = await cluster.add_decode(blocks=4)
    spec = cluster.router.spec(4 * BLOCK, max_tokens=10)
    cluster.router.direct(node, spec)
    ended = await cluster.router.hears(node, "ended", spec)
    assert (ended.status, ended.message) == (8, "the sequence may need 5 blocks, the pool has 4")


async def test_a_prompt_in_place_that_can_not_be_queued_ends_and_leaves_nothing(
    pair: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = pair.router.spec(40)

    def broken(*_: Any) -> None:
        raise ValueError("broken on purpose")

    with monkeypatch.context() as patch:
        patch.setattr(pair.d.role._residents, "start_waiting", broken)
        pair.router.direct(pair.d, spec)
        ended = await pair.router.hears(pair.d, "ended", spec)
    assert (ended.status, ended.message) == (13, "the worker failed: ValueError: broken on purpose")
    assert not pair.d.busy()
    pair.d.counts.add("commands_failed", -1)  # or the fixture finds it
    await pair.serve(pair.router.spec(20))
