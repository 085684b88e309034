"""A router with doubles around it, and the proof that a test leaves nothing behind."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import grpc
import pytest

from baton.config import RoleName, RouterConfig
from baton.errors import BatonError
from baton.rpc import net
from baton.rpc.status import from_rpc_error
from baton.spec import SequenceSpec
from baton.v1 import generation_pb2 as gen
from baton.v1 import worker_pb2 as wire
from baton.v1.admin_pb2 import GetStatusRequest, GetStatusResponse
from baton.v1.admin_pb2_grpc import AdminStub
from baton.v1.generation_pb2_grpc import GenerationStub
from router.app import Router
from tests.router.doubles import WAIT_S, WorkerDouble
from tests.router.tiny_model import EOS, encode


@pytest.fixture(autouse=True)
async def no_task_left() -> AsyncIterator[None]:
    """Fails a test that leaves an asyncio task behind."""
    before = asyncio.all_tasks()
    yield
    deadline = asyncio.get_running_loop().time() + 2.0
    while left := asyncio.all_tasks() - before - {asyncio.current_task()}:
        assert asyncio.get_running_loop().time() < deadline, f"tasks left: {left}"
        await asyncio.wait(left, timeout=0.1)


class Cluster:
    """A router in this process, its doubles, and a client."""

    def __init__(self, router: Router, channel: grpc.aio.Channel) -> None:
        self.router, self.channel = router, channel
        self.generation, self.admin = GenerationStub(channel), AdminStub(channel)
        self.workers: dict[str, WorkerDouble] = {}
        self.answer: list[int] = [*encode("Paris is the capital"), EOS]

    @property
    def prefill(self) -> WorkerDouble:
        return self.workers["p0"]

    @property
    def decode(self) -> WorkerDouble:
        return self.workers["d0"]

    def output(self, spec: SequenceSpec) -> list[int]:
        """What the doubles generate."""
        return self.answer

    async def add(self, name: str, role: RoleName, **changes: Any) -> WorkerDouble:
        """One more worker, joined and usable."""
        worker = WorkerDouble(name, role, self.output, **changes)
        await worker.start()
        self.workers[name] = worker
        for other in self.workers.values():
            other.peers = self.workers
        await worker.join(self.router.process.address)
        await self.until(lambda: self.usable(name))
        return worker

    def usable(self, name: str) -> bool:
        return any(worker.name == name and worker.usable for worker in self.router.registry.workers())

    async def until(self, condition: Any) -> None:
        """Waits for something that other tasks bring about."""
        async with asyncio.timeout(WAIT_S):
            while not condition():
                await asyncio.sleep(0.005)

    def call(self, timeout: float = WAIT_S, **fields: Any) -> Any:
        """Starts a Generate call; a prompt is set unless another input is."""
        if not {"prompt", "token_ids", "chat"} & fields.keys():
            fields["prompt"] = "hello world"
        return self.generation.Generate(gen.GenerateRequest(**fields), timeout=timeout)

    async def generate(self, **fields: Any) -> list[gen.GenerateResponse]:
        """All events of a call that ends well."""
        return [event async for event in self.call(**fields)]

    async def status(self) -> GetStatusResponse:
        return await self.admin.GetStatus(GetStatusRequest(), timeout=WAIT_S)

    def counted(self, name: str) -> int:
        return self.router.counts.snapshot().get(name, 0)

    async def idle(self) -> None:
        """Waits until the router holds nothing, and checks its books."""
        await self.until(lambda: not any(self.router.requests.live().values()))
        for worker in self.router.registry.workers():
            worker.prefill.check_integrity()
            worker.decode.check_integrity()
            assert not len(worker.prefill)
            assert not len(worker.decode)


def text_of(events: list[gen.GenerateResponse]) -> str:
    return "".join(event.tokens.text for event in events if event.HasField("tokens"))


def ids_of(events: list[gen.GenerateResponse]) -> list[int]:
    return [token for event in events if event.HasField("tokens") for token in event.tokens.ids]


async def error_of(call: object) -> BatonError:
    """How a call fails."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in call:  # type: ignore[attr-defined]
            pass
    return from_rpc_error(caught.value)


def refused(reason: str, **fields: object) -> wire.HandoffFailed:
    return wire.HandoffFailed(
        reason=wire.RefusalReason.Value(f"REFUSAL_REASON_{reason}"),
        message="says the script",
        **fields,  # type: ignore[arg-type]
    )


@pytest.fixture
def config() -> RouterConfig:
    """Overridden by tests that need another."""
    return RouterConfig(listen="127.0.0.1:0", name="router")


@pytest.fixture
async def empty(config: RouterConfig) -> AsyncIterator[Cluster]:
    """A router without workers."""
    router = Router(config)
    await router.start()
    async with AsyncExitStack() as stack:
        stack.push_async_callback(router.stop)
        channel = await stack.enter_async_context(net.open_channel(router.process.address))
        cluster = Cluster(router, channel)
        try:
            yield cluster
        finally:
            for worker in cluster.workers.values():
                await worker.stop()


@pytest.fixture
async def cluster(empty: Cluster) -> Cluster:
    """One prefill and one decode worker."""
    await empty.add("p0", "prefill")
    await empty.add("d0", "decode")
    return empty
