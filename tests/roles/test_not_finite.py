"""A sequence whose logits are not finite ends alone, and leaves no KV that others could find."""

from __future__ import annotations

from typing import Any

import pytest

from baton.cost import StepShape
from baton.spec import Sampling, SequenceSpec
from decode_worker.records import ResidentState
from kvtransfer.blocks.prefix import block_digests
from tests.roles.conftest import Cluster
from tests.roles.counting import LAYOUT
from tests.roles.node import Node
from tests.rpc.waiting import until

BLOCK = LAYOUT.block_tokens
WITH_LOGPROBS = Sampling(temperature=0.0, logprobs=1)


def findable(node: Node, spec: SequenceSpec) -> int:
    """Blocks of its prompt that the cache has."""
    digests = block_digests(spec.prompt, BLOCK, spec.tenant_salt, node.settings.fingerprint)
    return len(set(digests) & set(node.pool.digests()))


async def fails(cluster: Cluster, node: Node, spec: SequenceSpec) -> Any:
    """Waits for the one end, which says where."""
    ended = await cluster.router.hears(node, "ended", spec)
    position = spec.known_tokens + len(cluster.router.output(spec))
    assert (ended.status, ended.message) == (13, f"logits are not finite at position {position}")
    assert node.count("sequences_failed") == 1
    await cluster.idle()
    assert len(cluster.router.heard(node, "ended", spec)) == 1
    return ended


@pytest.mark.parametrize("bound", [True, False])
async def test_at_the_first_token(cluster: Cluster, bound: bool) -> None:
    """Also where its first blocks are on their way, or have arrived."""
    await cluster.add_prefill(chunk_tokens=256)
    await cluster.add_decode()
    cluster.p.engine.gate.clear()
    victim, healthy = cluster.router.spec(3 * BLOCK + 5), cluster.router.spec(3 * BLOCK + 2)
    cluster.p.engine.poisoned.add(victim.attempt)
    await (cluster.bound if bound else cluster.started)(victim)
    await cluster.bound(healthy)
    cluster.p.engine.gate.set()
    await cluster.finished(healthy)
    await fails(cluster, cluster.p, victim)
    assert [findable(node, victim) for node in (cluster.p, cluster.d)] == [0, 0]
    assert [findable(node, healthy) for node in (cluster.p, cluster.d)] == [3, 3]


async def test_in_the_middle_of_decode(pair: Cluster) -> None:
    victim, healthy = (pair.router.spec(2 * BLOCK + 3, max_tokens=60, sampling=WITH_LOGPROBS) for _ in range(2))
    pair.d.engine.gate.clear()
    for spec in (victim, healthy):
        await pair.bound(spec)
        await pair.router.hears(pair.d, "resident", spec)
    assert findable(pair.d, victim) == 2
    pair.d.engine.before_step = lambda steps: pair.d.engine.poisoned.add(victim.attempt) if steps == 20 else None
    pair.d.engine.gate.set()
    await fails(pair, pair.d, victim)
    assert len(pair.router.output(victim)) > 10
    await pair.finished(healthy)
    assert (findable(pair.d, victim), findable(pair.d, healthy)) == (0, 2)
    assert findable(pair.p, victim) == 2  # what is computed there led to a token


@pytest.mark.parametrize("steps", [0, 12])
async def test_in_place(cluster: Cluster, steps: int) -> None:
    """The prefix that was in the cache before stays, and serves the next sequence."""
    await cluster.add_decode(chunk_tokens=256)
    first = cluster.router.spec(2 * BLOCK + 1, max_tokens=2)
    cluster.router.direct(cluster.d, first)
    await cluster.router.hears(cluster.d, "ended", first)
    victim = cluster.router.spec([*first.prompt, *range(500, 500 + 2 * BLOCK)], max_tokens=40)
    healthy = cluster.router.spec(20, max_tokens=40)
    done = len(cluster.d.engine.batches)
    cluster.d.engine.before_step = lambda at: (
        cluster.d.engine.poisoned.add(victim.attempt) if at >= done + steps else None
    )
    cluster.d.engine.gate.clear()
    for spec in (victim, healthy):
        cluster.router.direct(cluster.d, spec)
    await until(lambda: cluster.d.role.live["residents"] == 2, "both started")
    cluster.d.engine.gate.set()
    await fails(cluster, cluster.d, victim)
    await cluster.router.hears(cluster.d, "ended", healthy)
    assert cluster.router.output(healthy) == cluster.router.expected(healthy)
    assert findable(cluster.d, victim) == findable(cluster.d, first) == 2
    again = cluster.router.spec(list(victim.prompt))
    cluster.router.direct(cluster.d, again)
    await cluster.router.hears(cluster.d, "ended", again)
    assert (await cluster.router.hears(cluster.d, "prefill_report", again)).cached_tokens == 2 * BLOCK
    assert cluster.router.output(again) == cluster.router.expected(again)


async def test_cancelled_during_the_step_that_fails(pair: Cluster) -> None:
    """The cancel is answered, and the KV is no more trusted for it."""
    victim = pair.router.spec(2 * BLOCK + 3, max_tokens=60)
    pair.d.engine.gate.clear()
    pair.d.engine.poisoned.add(victim.attempt)
    await pair.bound(victim)
    await pair.router.hears(pair.d, "resident", victim)
    await until(pair.d.engine.waiting.is_set, "the step")
    for node in (pair.p, pair.d):
        pair.router.cancel(node, victim)
    await until(lambda: [r for r in pair.d.role._residents if r.state is ResidentState.STOPPING], "the cancel")
    pair.d.engine.gate.set()
    await pair.router.hears(pair.d, "freed", victim)
    await pair.idle()
    assert findable(pair.d, victim) == 0


async def test_the_cost_model_learns_the_step(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    await cluster.add_decode()
    victim = cluster.router.spec(20)
    cluster.d.engine.poisoned.add(victim.attempt)
    observed: list[StepShape] = []
    monkeypatch.setattr(cluster.d.role.runner.model, "observe", lambda shape, seconds: observed.append(shape))
    cluster.router.direct(cluster.d, victim)
    await fails(cluster, cluster.d, victim)
    assert [shape.new_tokens for shape in observed] == [20]
