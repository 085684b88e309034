"""The order of prompts on a prefill worker."""

from __future__ import annotations

from tests.roles.conftest import Cluster
from tests.roles.counting import LAYOUT
from tests.rpc.waiting import until

BLOCK = LAYOUT.block_tokens


async def test_higher_priority_first_then_first_come(cluster: Cluster) -> None:
    await cluster.add_prefill(max_ungranted=1)
    await cluster.add_decode()
    blocker = cluster.router.spec(20)
    await cluster.started(blocker)
    specs = [cluster.router.spec(20, max_tokens=1, priority=priority) for priority in (0, 5, 0, 5, -1)]
    for spec in specs:
        cluster.router.prefill(cluster.p, spec)
    await until(lambda: cluster.p.busy().get("attempts") == 6, "all there")
    cluster.router.cancel(cluster.p, blocker)
    for spec in specs:
        await cluster.router.hears(cluster.p, "ended", spec)
    frames = cluster.router.links["p0"].frames
    order = [f.started.attempt for f in frames if f.WhichOneof("body") == "started"][1:]
    assert order == [specs[i].attempt for i in (1, 3, 0, 2, 4)]


async def test_no_more_start_than_have_a_grant(cluster: Cluster) -> None:
    await cluster.add_prefill(max_ungranted=2)
    await cluster.add_decode()
    specs = [cluster.router.spec(8, max_tokens=3) for _ in range(5)]
    for spec in specs:
        cluster.router.prefill(cluster.p, spec)
    await until(lambda: cluster.p.busy().get("attempts") == 5, "all there")
    await until(lambda: len(cluster.router.tokens(cluster.p, specs[1])) == 1, "two are computed")
    started = [spec for spec in specs if cluster.router.heard(cluster.p, "started", spec)]
    assert started == specs[:2]
    for spec in specs:  # each grant lets the next one start
        await cluster.router.hears(cluster.p, "started", spec)
        cluster.router.bind(cluster.p, spec, cluster.d)
    for spec in specs:
        await cluster.finished(spec)


async def test_waits_for_blocks(cluster: Cluster) -> None:
    await cluster.add_prefill(blocks=4)
    await cluster.add_decode()
    first, second = cluster.router.spec(3 * BLOCK, max_tokens=2), cluster.router.spec(2 * BLOCK, max_tokens=2)
    await cluster.started(first)
    cluster.router.prefill(cluster.p, second)
    await until(lambda: cluster.p.busy().get("attempts") == 2, "both there")
    assert cluster.router.heard(cluster.p, "started", second) == []
    cluster.router.bind(cluster.p, first, cluster.d)
    await cluster.finished(first)
    await cluster.router.hears(cluster.p, "started", second)
    cluster.router.bind(cluster.p, second, cluster.d)
    await cluster.finished(second)
    assert cluster.router.heard(cluster.p, "started", second)[0].queue_ms > 0


async def test_short_prompts_share_a_step(cluster: Cluster) -> None:
    await cluster.add_prefill(chunk_tokens=32)
    await cluster.add_decode()
    cluster.p.engine.gate.clear()
    specs = [cluster.router.spec(10, max_tokens=1) for _ in range(4)]
    for spec in specs:
        cluster.router.prefill(cluster.p, spec)
        await cluster.router.hears(cluster.p, "started", spec)
    cluster.p.engine.gate.set()
    for spec in specs:
        await cluster.router.hears(cluster.p, "ended", spec)
    assert sum(map(len, cluster.p.engine.batches)) <= 6
    assert max(map(len, cluster.p.engine.batches)) >= 3
    assert all(sum(count for _, count in batch) <= 32 for batch in cluster.p.engine.batches)


async def test_it_is_known_how_long_the_step_under_way_has_taken(cluster: Cluster) -> None:
    """Its age is no work ahead of the waiting prompts."""
    await cluster.add_prefill()
    runner = cluster.p.role.runner
    assert runner.under_way_s == 0
    cluster.p.engine.gate.clear()
    spec = cluster.router.spec(10, max_tokens=1)
    await cluster.started(spec)
    await until(lambda: runner.under_way_s > 0.01, "a step is under way")
    cluster.p.engine.gate.set()
    await cluster.router.hears(cluster.p, "ended", spec)
    await until(lambda: runner.under_way_s == 0, "it is done")
