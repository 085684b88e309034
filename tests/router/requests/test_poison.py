"""A request that coincides with the death of two workers: a third never gets it. Which deaths count, in each order."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from baton.errors import Internal, Unavailable
from router.workers import link as worker_link
from tests.router.conftest import Cluster, error_of, ids_of, refused
from tests.router.doubles import WorkerDouble


async def bound_again(cluster: Cluster, number: int) -> None:
    await cluster.until(lambda: cluster.prefill.count("bind") == number)


async def is_over(cluster: Cluster, call: Any, *names: str) -> None:
    """It ended because these two died, and a third decode worker never heard of it."""
    error = await error_of(call)
    assert isinstance(error, Internal), error
    assert str(error) == f"workers {' and '.join(names)} died while they had this request; it is not tried again"
    assert cluster.counted("requests_poisonous") == 1
    third = cluster.workers.get("d2")
    assert third is not None
    assert not third.attempts
    assert not third.count("cancel")
    await cluster.until(lambda: not any(cluster.router.requests.live().values()))


async def bound_to_a_second(cluster: Cluster, gate: str) -> tuple[Any, WorkerDouble, asyncio.Event]:
    """A call whose first decode worker died; its prompt stands at the gate, bound to the second, with a third there."""
    opened = cluster.prefill.gate(gate)
    cluster.prefill.refusals = [refused("UNREACHABLE")]  # what becomes of the first binding
    call = cluster.call()
    await cluster.prefill.at(gate)
    await bound_again(cluster, 1)
    second = await cluster.add("d1", "decode")
    await cluster.decode.stop()
    await bound_again(cluster, 2)
    await cluster.add("d2", "decode")
    return call, second, opened


@pytest.mark.parametrize("gate", ["started", "bound"], ids=["computing", "computed"])
@pytest.mark.parametrize("last", ["d1", "p0"])
async def test_bound_to_both_or_the_prefill_worker_after_the_decode_worker(
    cluster: Cluster, gate: str, last: str
) -> None:
    call, _, _ = await bound_to_a_second(cluster, gate)
    await cluster.workers[last].stop()
    await is_over(cluster, call, "d0", last)


@pytest.mark.parametrize("last", ["d1", "p0"])
async def test_the_second_dies_while_it_decodes(cluster: Cluster, last: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster.prefill, "_report", lambda *_, **__: None)  # so its blocks may be there still
    call, second, opened = await bound_to_a_second(cluster, "bound")
    second.gate("step 2")
    opened.set()
    await second.at("step 2")
    await cluster.until(lambda: not len(cluster.router.registry.by_name("p0").prefill))
    await cluster.workers[last].stop()
    await is_over(cluster, call, "d0", last)


async def test_one_that_may_have_blocks_of_a_failed_handoff_counts(cluster: Cluster) -> None:
    cluster.prefill.refusals = [refused("UNREACHABLE", retry_after_ms=200.0)]
    call = cluster.call()
    await cluster.until(lambda: cluster.counted("handoffs_failed_unreachable"))
    second = await cluster.add("d1", "decode")
    second.gate("received")
    await cluster.decode.stop()
    await second.at("received")
    await cluster.add("d2", "decode")
    await second.stop()
    await is_over(cluster, call, "d0", "d1")


@pytest.mark.parametrize("freed", [False, True])
async def test_one_that_was_left_counts_until_it_has_freed(
    cluster: Cluster, freed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The prefill worker often knows of a death before the router: it reports a failed handoff."""
    second = await cluster.add("d1", "decode")
    gate = second.gate("received")
    if not freed:
        monkeypatch.setattr(cluster.decode, "says", lambda **_: None)
    cluster.prefill.refusals = [refused("UNREACHABLE")]
    call = cluster.call()
    await second.at("received")
    await cluster.until(lambda: cluster.decode.cancelled)
    if freed:
        await cluster.until(lambda: not cluster.router.requests.commands.cancelling)
    await cluster.decode.stop()
    await cluster.until(lambda: cluster.counted("workers_lost") == 1)
    if freed:
        gate.set()
        assert ids_of([event async for event in call]) == cluster.answer
        return
    await cluster.add("d2", "decode")
    await second.stop()
    await is_over(cluster, call, "d0", "d1")


async def test_one_that_left_in_order_did_not_die(cluster: Cluster) -> None:
    gate = cluster.prefill.gate("bound")
    call = cluster.call()
    await bound_again(cluster, 1)
    second = await cluster.add("d1", "decode")
    cluster.router.registry.deregister(cluster.decode.process)
    await bound_again(cluster, 2)
    await cluster.add("d2", "decode")
    await second.stop()
    await bound_again(cluster, 3)
    cluster.prefill.refusals = [refused("UNREACHABLE"), refused("UNREACHABLE")]  # of the first two bindings
    gate.set()
    assert ids_of([event async for event in call]) == cluster.answer
    assert not cluster.counted("requests_poisonous")


async def test_one_whose_stream_stays_away_died(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_link, "GRACE_S", 0.2)
    monkeypatch.setattr(worker_link, "HELLO_S", 0.1)
    hang = asyncio.Event()

    async def silent(request_iterator: object, context: object) -> None:
        await hang.wait()

    cluster.prefill.gate("bound")
    call = cluster.call()
    await bound_again(cluster, 1)
    second = await cluster.add("d1", "decode")
    cluster.decode.on_attach = silent
    cluster.decode.break_stream()
    await bound_again(cluster, 2)
    hang.set()
    await cluster.add("d2", "decode")
    await second.stop()
    await is_over(cluster, call, "d0", "d1")


async def test_a_prefill_worker_that_has_freed_may_die_after_a_first_death(cluster: Cluster) -> None:
    call, second, opened = await bound_to_a_second(cluster, "bound")
    gate = second.gate("step 2")
    opened.set()
    await second.at("step 2")
    (request,) = cluster.router.requests._live.values()
    await cluster.until(lambda: request.attempt.report is not None)
    await cluster.prefill.stop()
    gate.set()
    assert ids_of([event async for event in call]) == cluster.answer


async def test_one_death_after_another_of_different_requests_are_not_added(cluster: Cluster) -> None:
    for name in ("d0", "d1"):
        if name not in cluster.workers:
            await cluster.add(name, "decode")
        worker = cluster.workers[name]
        worker.gate("step 2")
        call = cluster.call()
        await worker.at("step 2")
        await worker.stop()
        assert isinstance(await error_of(call), Unavailable)
    assert not cluster.counted("requests_poisonous")
