"""A small cluster for each test, and the proof that nothing is left of it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from typing import Any

import pytest

from baton.spec import SequenceSpec
from kvtransfer.transports.memory import Faults, MemoryNetwork
from tests.roles.node import DecodeNode, Node, PrefillNode, Settings
from tests.roles.scripted import ScriptedRouter
from tests.rpc.waiting import until

OUR_THREADS = ("engine", "kv-")


class Cluster:
    """A scripted router and the workers that a test adds."""

    def __init__(self) -> None:
        self.network = MemoryNetwork()
        self.router = ScriptedRouter()
        self.nodes: dict[str, Node] = {}

    @property
    def p(self) -> PrefillNode:
        """The first prefill worker."""
        node = self.nodes["p0"]
        assert isinstance(node, PrefillNode)
        return node

    @property
    def d(self) -> DecodeNode:
        """The first decode worker."""
        node = self.nodes["d0"]
        assert isinstance(node, DecodeNode)
        return node

    async def add_prefill(self, name: str = "p0", attach: bool = True, **settings: Any) -> PrefillNode:
        """One more."""
        node = PrefillNode(name, self.network, Settings(**settings))
        await self._start(node, attach)
        return node

    async def add_decode(self, name: str = "d0", attach: bool = True, **settings: Any) -> DecodeNode:
        """One more."""
        node = DecodeNode(name, self.network, Settings(**settings))
        await self._start(node, attach)
        return node

    def faults(self) -> Faults:
        """The switchboard of the memory double between p0 and d0."""
        return self.network.faults(self.p.process.incarnation, self.d.transport.endpoint())

    def writing(self) -> bool:
        """Whether a write of p0 is under way."""
        return any(sender.writes for sender in self.p.role.senders)

    async def started(self, spec: SequenceSpec) -> None:
        """Queues a prompt on p0 and waits until it computes."""
        self.router.prefill(self.p, spec)
        await self.router.hears(self.p, "started", spec)

    async def bound(self, spec: SequenceSpec, handoff: int = 1) -> None:
        """Queues a prompt and binds it to d0."""
        await self.started(spec)
        self.router.bind(self.p, spec, self.d, handoff)

    async def finished(self, spec: SequenceSpec) -> Any:
        """Waits for the end on d0, and checks all that the router was told."""
        ended = await self.router.hears(self.d, "ended", spec)
        await self.router.hears(self.p, "prefill_report", spec)
        assert not ended.HasField("status"), ended.message
        assert self.router.output(spec) == self.router.expected(spec, ended.output_tokens - len(spec.output))
        return ended

    async def serve(self, spec: SequenceSpec) -> Any:
        """The whole life of one request on p0 and d0."""
        await self.bound(spec)
        return await self.finished(spec)

    async def idle(self) -> None:
        """Waits until no worker holds anything, and checks the books."""
        for node in self.nodes.values():
            await until(lambda node=node: not node.busy(), f"{node.name} idle, holds {node.busy()}")  # type: ignore[misc]
            node.check()

    async def stop(self) -> None:
        """Ends everything."""
        await self.router.stop()
        for node in self.nodes.values():
            await node.stop()

    async def _start(self, node: Node, attach: bool) -> None:
        self.nodes[node.name] = node
        await node.start()
        if attach:
            await self.router.attach(node)


def our_threads() -> set[threading.Thread]:
    """Those that Baton started."""
    return {thread for thread in threading.enumerate() if thread.name.startswith(OUR_THREADS)}


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    """Empty; checked and stopped at the end."""
    tasks, threads = asyncio.all_tasks(), our_threads()
    faults: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: faults.append(context))
    cluster = Cluster()
    try:
        yield cluster
        for node in cluster.nodes.values():
            node.engine.gate.set()
        await cluster.idle()
    finally:
        await cluster.stop()
    await until(lambda: asyncio.all_tasks() <= tasks | {asyncio.current_task()}, "no task left")
    assert our_threads() <= threads
    assert faults == []


@pytest.fixture
async def pair(cluster: Cluster) -> Cluster:
    """One prefill and one decode worker over the memory double."""
    await cluster.add_prefill()
    await cluster.add_decode()
    return cluster
