"""A router that does what a test says: the real protocol, and no policy at all."""

from __future__ import annotations

import asyncio
import os
import uuid
from collections import defaultdict
from typing import Any, Protocol

import grpc

from baton.identity import mint_process
from baton.rpc.convert import process_to_wire, spec_to_wire
from baton.rpc.link import SILENCE_S, Session, read_frames
from baton.rpc.net import cancelling, open_channel
from baton.spec import ProcessRef, Sampling, SequenceSpec
from baton.v1 import worker_pb2 as wire
from baton.v1.worker_pb2_grpc import WorkerStub
from tests.roles.counting import continuation
from tests.rpc.waiting import until


class Node(Protocol):
    """A worker, here or in another process."""

    name: str
    process: ProcessRef


class Link:
    """The router's end of one worker's stream."""

    def __init__(self, router: ScriptedRouter, node: Node) -> None:
        self.router, self.node = router, node
        self.frames: list[wire.WorkerFrame] = []
        self.session: Session[wire.RouterFrame, wire.WorkerFrame] = Session(
            wire.RouterFrame, wire.WorkerFrame, node.name, self.frames.append
        )
        self.session_id = str(uuid.uuid4())
        self.resumed: list[bool] = []
        self._task: asyncio.Task[None] | None = None

    async def attach(self) -> None:
        """Opens a stream and waits for its hello."""
        greeted = len(self.resumed) + 1
        self._task = asyncio.create_task(self._run(), name=f"test link to {self.node.name}")
        await until(lambda: len(self.resumed) == greeted, "the hello")

    @property
    def broken(self) -> bool:
        """Whether the stream has ended."""
        return self._task is None or self._task.done()

    async def detach(self) -> None:
        """Breaks the stream."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    async def _run(self) -> None:
        async with open_channel(self.node.process.address) as channel:
            call: Any = WorkerStub(channel).Attach()
            hello = wire.Hello(
                process=process_to_wire(self.router.process), session=self.session_id, received=self.session.received
            )
            try:
                await call.write(wire.RouterFrame(hello=hello))
                frames = aiter(call)
                answer = (await anext(frames)).hello
                self.session.attach(answer.received)
                self.resumed.append(answer.resumed)
                writer = asyncio.create_task(self._write(call))
                async with cancelling(writer):
                    await read_frames(self.session, frames, SILENCE_S, lambda _: None)
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError, TimeoutError):
                pass  # it broke, or the worker fell silent: a test that expects so goes on
            finally:
                self.session.detach()
                call.cancel()

    async def _write(self, call: Any) -> None:
        async for frame in self.session.outgoing():
            await call.write(frame)


class ScriptedRouter:
    """One incarnation of a router, attached to some workers."""

    def __init__(self, name: str = "router") -> None:
        self.process = mint_process("router", "", name)
        self.links: dict[str, Link] = {}

    async def attach(self, *nodes: Node) -> None:
        """Opens its stream to each."""
        for node in nodes:
            self.links[node.name] = Link(self, node)
            await self.links[node.name].attach()

    async def attach_again(self, node: Node) -> None:
        """Where the stream broke: a new session, after what was heard on the former."""
        former = self.links[node.name]
        if former.broken:
            await former.detach()
            link = self.links[node.name] = Link(self, node)
            link.frames.extend(former.frames)
            await link.attach()

    async def stop(self) -> None:
        """Its streams break for good."""
        for link in self.links.values():
            await link.detach()

    def spec(self, prompt: int | list[int], max_tokens: int = 4, **fields: Any) -> SequenceSpec:
        """A sequence; a number stands for a prompt of that length that no other test sequence begins with."""
        if isinstance(prompt, int):
            first = int.from_bytes(os.urandom(4), "little")
            prompt = [first, *range(prompt - 1)]
        return SequenceSpec(
            attempt=os.urandom(16),
            request_id="test",
            prompt=tuple(prompt),
            sampling=fields.pop("sampling", Sampling(temperature=0.0)),
            max_tokens=max_tokens,
            router=fields.pop("router", self.process),
            **fields,
        )

    def say(self, node: Node, **body: Any) -> None:
        """Any command."""
        self.links[node.name].session.send(wire.RouterFrame(**body))

    def prefill(self, node: Node, spec: SequenceSpec) -> None:
        """Queues a prompt."""
        self.say(node, prefill=wire.PrefillCommand(spec=spec_to_wire(spec)))

    def direct(self, node: Node, spec: SequenceSpec) -> None:
        """Queues a prompt that the decode worker computes itself."""
        self.say(node, direct=wire.DirectCommand(spec=spec_to_wire(spec)))

    def bind(self, node: Node, spec: SequenceSpec, decode: Node | ProcessRef, handoff: int = 1) -> None:
        """Names the decode worker."""
        process = process_to_wire(decode if isinstance(decode, ProcessRef) else decode.process)
        self.say(node, bind=wire.BindCommand(attempt=spec.attempt, handoff=handoff, decode_worker=process))

    def cancel(self, node: Node, spec: SequenceSpec) -> None:
        """Forgets an attempt."""
        self.say(node, cancel=wire.CancelCommand(attempt=spec.attempt, reason="test"))

    def heard(self, node: Node, kind: str, spec: SequenceSpec) -> list[Any]:
        """All frames of a kind from one worker about one attempt."""
        bodies = [getattr(f, kind) for f in self.links[node.name].frames if f.WhichOneof("body") == kind]
        return [body for body in bodies if body.attempt == spec.attempt]

    async def hears(self, node: Node, kind: str, spec: SequenceSpec, count: int = 1) -> Any:
        """Waits for the `count`-th frame of a kind about an attempt."""
        await until(lambda: len(self.heard(node, kind, spec)) >= count, f"{kind} from {node.name}")
        return self.heard(node, kind, spec)[count - 1]

    def tokens(self, node: Node, spec: SequenceSpec) -> dict[int, int]:
        """Token by position, as one worker sent them; each position says the same whenever it comes."""
        found: dict[int, int] = {}
        for frame in self.links[node.name].frames:
            for run in frame.tokens.runs if frame.WhichOneof("body") == "tokens" else ():
                for position, token in enumerate(run.ids, run.position):
                    if run.attempt == spec.attempt:
                        assert found.setdefault(position, token) == token
        return found

    def output(self, spec: SequenceSpec) -> list[int]:
        """All tokens that came, from whomever, which must leave no gap."""
        merged: defaultdict[int, set[int]] = defaultdict(set)
        for link in self.links.values():
            for position, token in self.tokens(link.node, spec).items():
                merged[position].add(token)
        positions = sorted(merged)
        assert positions == list(range(spec.known_tokens, spec.known_tokens + len(positions)))
        assert all(len(tokens) == 1 for tokens in merged.values())
        return [merged[position].pop() for position in positions]

    def expected(self, spec: SequenceSpec, count: int | None = None) -> list[int]:
        """What the model would say."""
        return continuation((*spec.prompt, *spec.output), count or spec.max_tokens - len(spec.output))
