"""Workers in processes of their own, and a scripted router in the test's."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import psutil

from baton.spec import ProcessRef, SequenceSpec
from tests.faults.proxy import Proxy
from tests.faults.stopping import Plan, Step
from tests.faults.worker_process import Report, main
from tests.roles.counting import LAYOUT
from tests.roles.node import Settings
from tests.roles.scripted import ScriptedRouter
from tests.rpc.waiting import WAIT_S, until

KINDS = ("shm", "tcp")
"""Another transport joins the matrix here; `PrefillNode.writer` and `DecodeNode.receiver` have to know it."""
LEASE_S, DEADLINE_S = 1.5, 2.0
BLOCKS = 20
PROMPT = 5 * LAYOUT.block_tokens + 8
PROMPT_BLOCKS = 6
CHUNK = 2 * LAYOUT.block_tokens
MAX_TOKENS = 12
MODULE = "tests.faults.worker_process"


class RemoteNode:
    """One worker process. Compare `tests.roles.node.Node`, which runs in the test's own."""

    def __init__(self, plan: Plan) -> None:
        self.name, self.plan = plan.name, plan
        self.process = ProcessRef(plan.name, "", "")
        context = multiprocessing.get_context("forkserver")  # forks from a process that has all imported: 20 ms each
        context.set_forkserver_preload([MODULE])
        self._control, control = context.Pipe()
        self._steps, steps = context.Pipe()
        self._child = context.Process(target=main, args=(control, steps, plan), name=plan.name)
        self._child.start()
        control.close()
        steps.close()
        assert self._child.pid is not None
        self.pid = self._child.pid

    async def started(self) -> None:
        """Waits until it serves."""
        self.process = await self._answer("its start")

    async def ask(self, verb: str, *arguments: Any) -> Any:
        """Sends one of the verbs of `worker_process`; its answer."""
        self._control.send((verb, arguments))
        return await self._answer(verb)

    async def report(self) -> Report:
        """What it holds."""
        found: Report = await self.ask("report")
        return found

    async def at(self, step: Step) -> None:
        """Waits until it has stopped itself there."""
        await until(self._steps.poll, f"{self.name} {step.value}")
        assert self._steps.recv() == step.value

    def go(self) -> None:
        """On from where it stopped itself."""
        self._steps.send("go")

    def signal(self, number: signal.Signals) -> None:
        """To its process."""
        os.kill(self.pid, number)

    async def until(self, condition: Callable[[Report], object], what: str) -> Report:
        """Asks until the answer is as it should be."""
        end = asyncio.get_running_loop().time() + WAIT_S
        while not condition(found := await self.report()):
            assert asyncio.get_running_loop().time() < end, f"{self.name} did not come to it: {what}: {found}"
            await asyncio.sleep(0.01)
        return found

    async def idle(self) -> Report:
        """Waits until it holds nothing; its books must balance then."""
        found = await self.until(lambda report: not report.busy, "to hold nothing")
        assert found.fault == ""
        return found

    async def end(self) -> None:
        """Its process ends; by force if it has to."""
        if self._child.is_alive() and psutil.Process(self.pid).status() == psutil.STATUS_STOPPED:
            self.signal(signal.SIGCONT)
        self._control.close()
        self._steps.close()
        try:
            await until(lambda: not self._child.is_alive(), f"the end of {self.name}")
        finally:
            self._child.kill()
            self._child.join()
            self._child.close()

    async def _answer(self, what: str) -> Any:
        await until(self._control.poll, f"{self.name} answers: {what}")
        return self._control.recv()


class Workers:
    """Some workers, and a router which is attached to all of them."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.router = ScriptedRouter()
        self.nodes: dict[str, RemoteNode] = {}
        self.wire: Proxy | None = None
        self.control: Proxy | None = None

    def add(self, name: str, stop_at: Step | None = None, settings: dict[str, Any] | None = None, **plan_: Any) -> None:
        """One more: a prefill worker if its name begins with p."""
        role = "prefill" if name.startswith("p") else "decode"
        ordinary = Settings(
            kind=self.kind,
            blocks=64 if role == "prefill" else BLOCKS,
            chunk_tokens=CHUNK,
            handoff_deadline_s=DEADLINE_S,
            lease_s=LEASE_S,
        )
        changed = replace(ordinary, **(settings or {}))
        plan = Plan(role=role, name=name, settings=changed, stop_at=stop_at, prompt_blocks=PROMPT_BLOCKS, **plan_)
        self.nodes[name] = RemoteNode(plan)

    def __getitem__(self, name: str) -> RemoteNode:
        return self.nodes[name]

    async def start(self, proxied: bool = False, control_proxied: bool = False) -> None:
        """Until all serve. `proxied`: writers reach d0's blocks by a wire that the test holds; `control_proxied`: and
        d0's control streams by another."""
        await asyncio.gather(*(node.started() for node in self.nodes.values()))
        if proxied:
            self.wire = Proxy(await self["d0"].ask("endpoint"))
            await self["d0"].ask("advertise", await self.wire.start())
        if control_proxied:
            self.control = Proxy(self["d0"].process.address)
            await self.control.start()
        await self.router.attach(*self.nodes.values())

    def bind(self, spec: SequenceSpec, prefill: str, decode: str, handoff: int) -> None:
        """Names the decode worker to the prefill worker."""
        process = self[decode].process
        if self.control is not None and decode == "d0":
            process = replace(process, address=self.control.address)
        self.router.bind(self[prefill], spec, process, handoff)

    def spec(self, prompt: int = PROMPT, max_tokens: int = MAX_TOKENS) -> SequenceSpec:
        """A sequence that no other begins like."""
        return self.router.spec(prompt, max_tokens)

    async def begin(self, spec: SequenceSpec, prefill: str, decode: str) -> None:
        """Starts a prompt, and binds it."""
        self.router.prefill(self[prefill], spec)
        await self.router.hears(self[prefill], "started", spec)
        self.bind(spec, prefill, decode, 1)

    async def failed(self, spec: SequenceSpec, prefill: str, handoff: int = 1) -> Any:
        """Waits for the news that a handoff came to nothing."""
        return await self.router.hears(self[prefill], "handoff_failed", spec, handoff)

    async def carry_on(self, spec: SequenceSpec, prefill: str, decode: str, handoff: int) -> int:
        """What a router does: binds, again and again, until the sequence has ended well. The number of handoffs."""
        p, d = self[prefill], self[decode]
        failures = len(self.router.heard(p, "handoff_failed", spec))
        self.bind(spec, prefill, decode, handoff)
        while True:
            await until(partial(self._news, spec, p, failures, d, "ended"), f"the end of {spec.attempt.hex()[:6]}")
            if self.router.heard(d, "ended", spec):
                break
            failures, handoff = failures + 1, handoff + 1
            await asyncio.sleep(0.05)  # as the router's own pause
            self.bind(spec, prefill, decode, handoff)
        await self.ended(spec, decode)
        await until(partial(self._news, spec, p, failures, p, "prefill_report"), "the prefill worker's word")
        if not self.router.heard(p, "prefill_report", spec):  # the sequence did arrive: only the news of it got lost
            self.router.cancel(p, spec)
        return handoff

    def _news(self, spec: SequenceSpec, prefill: RemoteNode, failures: int, node: RemoteNode, kind: str) -> bool:
        """Whether a worker said this, or more handoffs than those have failed."""
        failed = self.router.heard(prefill, "handoff_failed", spec)
        return bool(self.router.heard(node, kind, spec)) or len(failed) > failures

    async def ended(self, spec: SequenceSpec, decode: str) -> None:
        """Waits for the end; all tokens must be what the whole KV leads to."""
        ended = await self.router.hears(self[decode], "ended", spec)
        assert not ended.HasField("status"), ended.message
        assert self.router.output(spec) == self.router.expected(spec)

    async def serve(self, spec: SequenceSpec, prefill: str, decode: str) -> int:
        """The whole life of a sequence."""
        self.router.prefill(self[prefill], spec)
        await self.router.hears(self[prefill], "started", spec)
        return await self.carry_on(spec, prefill, decode, 1)

    async def whole_pool(self, prefill: str, decode: str) -> None:
        """A sequence that takes every block of a decode worker ends well."""
        spec = self.spec(BLOCKS * LAYOUT.block_tokens - MAX_TOKENS)
        await self.serve(spec, prefill, decode)

    async def stop(self) -> None:
        """Ends everything."""
        await self.router.stop()
        for proxy in (self.wire, self.control):
            if proxy is not None:
                await proxy.stop()
        for node in self.nodes.values():
            await node.end()


@asynccontextmanager
async def workers(kind: str) -> AsyncIterator[Workers]:
    """None yet: `add` some, then `start`."""
    made = Workers(kind)
    try:
        yield made
    finally:
        await made.stop()
