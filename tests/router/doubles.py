"""A worker that speaks the real protocol over a real server, with the model replaced by a script.

`WorkerDouble` answers Attach with a `Session`, like a worker. For each prompt it plays the life of the request:
Started, first token, handoff to the other double (a method call in place of the Transfer service), Resident, tokens,
Ended. Gates stop it at a point until a test opens them; `says` sends any frame at any time.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc

from baton.config import RoleName
from baton.rpc import net
from baton.rpc.convert import process_to_wire, spec_from_wire
from baton.rpc.link import Session
from baton.spec import ProcessRef, SequenceSpec
from baton.v1 import worker_pb2 as wire
from baton.v1.worker_pb2_grpc import RegistryStub, WorkerServicer, add_WorkerServicer_to_server
from tests.router.tiny_model import artifacts, card
from tests.rpc.servers import start_server

WAIT_S = 5.0


class WorkerDouble(WorkerServicer):
    """`output(spec)` are the tokens that it generates; see the head of this file."""

    def __init__(self, name: str, role: RoleName, output: Callable[[SequenceSpec], list[int]], **changes: Any) -> None:
        self.role, self.output = role, output
        self.process = ProcessRef(name, changes.pop("incarnation", f"{name}-1"), "")
        self.card = changes.pop("card", None) or card()
        self.blocks = changes.pop("blocks", 8192)
        self.files = artifacts()
        self.peers: dict[str, WorkerDouble] = {}
        self.gates: dict[str, asyncio.Event] = {}
        self.reached: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)
        self.commands: list[wire.RouterFrame] = []
        self.cancelled: list[bytes] = []
        self.attempts: list[bytes] = []
        self.refusals: list[wire.HandoffFailed] = []
        self.repeats = 1
        self.session: Session[wire.WorkerFrame, wire.RouterFrame] | None = None
        self.greetings: list[bool] = []
        self.on_attach: Callable[[Any, Any], Awaitable[None]] | None = None
        self._session_id = ""
        self._binds: dict[bytes, asyncio.Queue[wire.BindCommand]] = {}
        self._work: dict[bytes, asyncio.Task[None]] = {}
        self._server: net.Server | None = None
        self._break = asyncio.Event()
        self._greeted = asyncio.Event()

    # Its life.

    async def start(self) -> None:
        entry = net.service(add_WorkerServicer_to_server, self, "Worker")
        self._server = await start_server("127.0.0.1:0", [entry])
        self.process = ProcessRef(self.process.name, self.process.incarnation, self._server.address)

    async def join(self, router: str) -> None:
        """Registers and waits until the router has attached."""
        await self.register(router)
        async with asyncio.timeout(WAIT_S):
            await self._greeted.wait()

    async def register(self, router: str) -> None:
        """Registers; the router may find that it can't use this worker."""
        roles = {"prefill": wire.ROLE_PREFILL, "decode": wire.ROLE_DECODE}
        request = wire.RegisterRequest(
            worker=process_to_wire(self.process),
            roles=[roles[self.role]],
            model=self.card,
            capacity=wire.Capacity(blocks=self.blocks, max_sequences=64),
            transports=["memory"],
        )
        async with net.open_channel(router) as channel:
            await RegistryStub(channel).Register(request, timeout=WAIT_S)

    async def stop(self) -> None:
        """Dies: its port closes, its streams break."""
        for task in self._work.values():
            task.cancel()
        await asyncio.gather(*self._work.values(), return_exceptions=True)
        if self.session is not None:
            self.session.close()
        if self._server is not None:
            await self._server.stop(0)
            self._server = None

    def break_stream(self) -> None:
        """The stream ends; the session stays."""
        self._greeted.clear()
        self._break.set()

    # Tests' hands.

    def gate(self, name: str) -> asyncio.Event:
        """The work stops at this point until the event is set."""
        self.gates[name] = asyncio.Event()
        return self.gates[name]

    async def at(self, name: str) -> None:
        """Waits until some work has come to this point."""
        async with asyncio.timeout(WAIT_S):
            await self.reached[name].wait()

    def says(self, **body: Any) -> None:
        assert self.session is not None
        self.session.send(wire.WorkerFrame(**body))

    def tokens(self, attempt: bytes, position: int, ids: list[int]) -> None:
        self.says(tokens=wire.TokenFrame(runs=[wire.TokenRun(attempt=attempt, position=position, ids=ids)]))

    def count(self, body: str) -> int:
        """How many commands of this kind came."""
        return sum(command.WhichOneof("body") == body for command in self.commands)

    # Its services.

    async def FetchArtifact(
        self, request: wire.FetchArtifactRequest, context: Any
    ) -> AsyncIterator[wire.FetchArtifactResponse]:
        """Sends an artifact in pieces."""
        data = self.files[request.sha256]
        for start in range(0, len(data), 4096):
            yield wire.FetchArtifactResponse(data=data[start : start + 4096])

    async def Attach(self, request_iterator: Any, context: Any) -> None:  # type: ignore[override]
        """Takes up the session that the router names, or begins it."""
        if self.on_attach is not None:
            return await self.on_attach(request_iterator, context)
        hello = (await context.read()).hello
        resumed = self.session is not None and self._session_id == hello.session
        if not resumed:
            self._session_id = hello.session
            self.session = Session(wire.WorkerFrame, wire.RouterFrame, self.process.name, self._on_frame)
        session = self.session
        assert session is not None
        answer = wire.Hello(
            process=process_to_wire(self.process), session=hello.session, received=session.received, resumed=resumed
        )
        await context.write(wire.WorkerFrame(hello=answer))
        session.attach(hello.received)
        self.greetings.append(resumed)
        self._break.clear()
        self._greeted.set()
        pumps = [
            asyncio.create_task(self._read(session, context)),
            asyncio.create_task(self._write(session, context)),
            asyncio.create_task(self._break.wait()),
        ]
        try:
            async with net.cancelling(*pumps):
                await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            session.detach()
        if self._break.is_set():
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the stream broke")
        return None

    async def _read(self, session: Session[wire.WorkerFrame, wire.RouterFrame], context: Any) -> None:
        while (frame := await context.read()) is not grpc.aio.EOF:
            session.receive(frame)

    async def _write(self, session: Session[wire.WorkerFrame, wire.RouterFrame], context: Any) -> None:
        async for frame in session.outgoing():
            await context.write(frame)

    # Its work.

    def _on_frame(self, frame: wire.RouterFrame) -> None:
        self.commands.append(frame)
        kind = frame.WhichOneof("body")
        if kind == "prefill":
            spec = spec_from_wire(frame.prefill.spec)
            self.attempts.append(spec.attempt)
            self._binds[spec.attempt] = asyncio.Queue()
            self._begin(spec.attempt, self._prefill(spec))
        elif kind == "bind" and frame.bind.attempt in self._binds:
            self._binds[frame.bind.attempt].put_nowait(frame.bind)
        elif kind == "cancel":
            attempt = frame.cancel.attempt
            self.cancelled.append(attempt)
            if attempt in self._work:
                self._work.pop(attempt).cancel()
            self.says(freed=wire.Freed(attempt=attempt))

    def _begin(self, attempt: bytes, work: Any) -> None:
        task = asyncio.create_task(work, name=f"{self.process.name} {attempt.hex()[:6]}")
        self._work[attempt] = task
        task.add_done_callback(lambda done: self._work.pop(attempt, None) if self._work.get(attempt) is done else None)

    async def _pass(self, name: str) -> None:
        self.reached[name].set()
        if name in self.gates:
            await self.gates[name].wait()

    def _ends(self, spec: SequenceSpec, count: int, token: int) -> int:
        if token in spec.eos_token_ids:
            return 1
        if token in spec.stop_token_ids:
            return 2
        return 4 if count == spec.max_tokens else 0

    async def _prefill(self, spec: SequenceSpec) -> None:
        await self._pass("queued")
        self.says(started=wire.Started(attempt=spec.attempt, queue_ms=1.5, cached_tokens=0))
        await self._pass("started")
        output, count = self.output(spec)[len(spec.output) :], len(spec.output) + 1
        self.tokens(spec.attempt, spec.known_tokens, output[:1])
        self.reached["first"].set()
        if reason := self._ends(spec, count, output[0]):
            self._report(spec.attempt, moved=False)
            ended = wire.Ended(attempt=spec.attempt, reason=reason, output_tokens=count)  # type: ignore[arg-type]
            self.says(ended=ended)
            return
        await self._hand_over(spec, output)
        self._report(spec.attempt, moved=True)

    async def _hand_over(self, spec: SequenceSpec, output: list[int]) -> None:
        while True:
            bind = await self._binds[spec.attempt].get()
            await self._pass("bound")
            if not self.refusals:
                break
            refusal = self.refusals.pop(0)
            refusal.attempt, refusal.handoff = spec.attempt, bind.handoff
            self.says(handoff_failed=refusal)
        await self.peers[bind.decode_worker.name].receive(spec, bind.handoff, output).wait()

    def receive(self, spec: SequenceSpec, handoff: int, output: list[int]) -> asyncio.Event:
        """The blocks of a sequence come (a decode double); the event says that they are committed."""
        self.attempts.append(spec.attempt)
        committed = asyncio.Event()
        self._begin(spec.attempt, self._decode(spec, handoff, output, committed))
        return committed

    async def _decode(self, spec: SequenceSpec, handoff: int, output: list[int], committed: asyncio.Event) -> None:
        await self._pass("received")
        committed.set()
        for _ in range(self.repeats):
            self.says(resident=wire.Resident(attempt=spec.attempt, handoff=handoff))
        for index, token in enumerate(output):
            await self._pass(f"step {index}")
            for _ in range(self.repeats):
                self.tokens(spec.attempt, spec.known_tokens + index, [token])
            await asyncio.sleep(0)
            count = len(spec.output) + index + 1
            if reason := self._ends(spec, count, token):
                break
        else:
            raise AssertionError("the script ran out of tokens")
        ended = wire.Ended(attempt=spec.attempt, reason=reason, output_tokens=count, decode_ms=3.5)  # type: ignore[arg-type]
        for _ in range(self.repeats):
            self.says(ended=ended)

    def _report(self, attempt: bytes, *, moved: bool) -> None:
        report = wire.PrefillReport(attempt=attempt, queue_ms=1.5, prefill_ms=7.5)
        if moved:
            report.transport, report.transfer_bytes, report.transfer_blocks = "memory", 4096, 2
        for _ in range(self.repeats):
            self.says(prefill_report=report)
