"""Grants that were given up and wait for proof take blocks, and no sequence slots."""

from __future__ import annotations

from typing import Any

import pytest

from baton.spec import SequenceSpec
from baton.worker.sending.sender import Sender
from tests.roles.conftest import Cluster
from tests.roles.counting import LAYOUT
from tests.rpc.waiting import until

BLOCK = LAYOUT.block_tokens


class WithoutProof:
    """Two sequences that p0 hands over to d0, which has two slots; their closes are held back until `prove`."""

    def __init__(self, cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
        self.cluster, self._monkeypatch, self._close = cluster, monkeypatch, Sender.send_close
        self._held: list[tuple[Any, ...]] = []
        self._specs: list[SequenceSpec] = []
        monkeypatch.setattr(Sender, "send_close", lambda *given: self._held.append(given))

    async def granted(self) -> None:
        await self.cluster.add_prefill(kind="shm")
        await self.cluster.add_decode(kind="shm", max_sequences=2)
        self.cluster.p.engine.gate.clear()
        self._specs = [self.cluster.router.spec(3 * BLOCK) for _ in range(2)]
        for spec in self._specs:
            await self.cluster.bound(spec)
        await until(lambda: self.cluster.d.role.live["grants"] == 2, "the grants")

    async def given_up(self) -> None:
        for spec in self._specs:
            self.cluster.router.cancel(self.cluster.d, spec)
        await until(lambda: self.cluster.d.role.live["aborting"] == 2, "given up")
        await until(lambda: len(self._held) == 2, "the closes")

    def prove(self) -> None:
        self._monkeypatch.setattr(Sender, "send_close", self._close)
        for given in self._held:
            self._close(*given)
        for spec in self._specs:
            self.cluster.router.cancel(self.cluster.p, spec)
        self.cluster.p.engine.gate.set()


def reported(cluster: Cluster) -> tuple[int, int]:
    """The sequences that the latest load report of d0 counts: waiting, running."""
    frames = cluster.router.links["d0"].frames
    loads = [frame.load for frame in frames if frame.WhichOneof("body") == "load"]
    return loads[-1].waiting, loads[-1].running


async def test_they_leave_all_slots_to_others(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    two = WithoutProof(cluster, monkeypatch)
    await two.granted()
    await two.given_up()
    await until(lambda: reported(cluster) == (0, 0), "a report without waiting ones")
    p1 = await cluster.add_prefill("p1", kind="shm")
    cluster.d.engine.gate.clear()
    specs = [cluster.router.spec(2 * BLOCK, max_tokens=5) for _ in range(2)]
    for spec in specs:
        cluster.router.prefill(p1, spec)
        await cluster.router.hears(p1, "started", spec)
        cluster.router.bind(p1, spec, cluster.d)
        await cluster.router.hears(cluster.d, "resident", spec)
    await until(lambda: reported(cluster) == (0, 2), "both run")
    third = cluster.router.spec(2 * BLOCK)
    cluster.router.prefill(p1, third)
    await cluster.router.hears(p1, "started", third)
    cluster.router.bind(p1, third, cluster.d)
    await cluster.router.hears(p1, "handoff_waiting", third)
    cluster.router.cancel(p1, third)
    assert cluster.d.pool.statistics().quarantined == 6
    cluster.d.engine.gate.set()
    for spec in specs:
        ended = await cluster.router.hears(cluster.d, "ended", spec)
        assert not ended.HasField("status"), ended.message
        assert cluster.router.output(spec) == cluster.router.expected(spec)
    assert cluster.d.pool.statistics().quarantined == 6
    two.prove()
    await cluster.idle()


async def test_a_prompt_that_waits_for_a_slot_starts_at_once(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not wait for the proof."""
    two = WithoutProof(cluster, monkeypatch)
    await two.granted()
    spec = cluster.router.spec(BLOCK, max_tokens=2)
    cluster.router.direct(cluster.d, spec)
    await until(lambda: cluster.d.role.live["prompts_waiting"] == 1, "the prompt")
    await two.given_up()
    await cluster.router.hears(cluster.d, "ended", spec)
    two.prove()
    await cluster.idle()
