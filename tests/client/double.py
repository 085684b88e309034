"""A server that speaks Generation and Admin from a script, for tests of the client and of the commands."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc

from baton import errors
from baton.rpc.net import service
from baton.rpc.status import abort
from baton.v1 import admin_pb2, admin_pb2_grpc, generation_pb2, generation_pb2_grpc, worker_pb2
from tests.rpc.servers import start_server

gen = generation_pb2
PIECES = ["The capital", " of France", " is Paris."]
PROCESS = worker_pb2.ProcessId(name="router-1", incarnation="i-1", address="127.0.0.1:9")


def accepted() -> gen.GenerateResponse:
    """The first event."""
    return gen.GenerateResponse(
        accepted=gen.Accepted(request_id="r-1", model="tiny", seed=7, prompt_tokens=5, max_tokens=3)
    )


def tokens(index: int, *, logprobs: int | None = None) -> gen.GenerateResponse:
    """The event of output token `index`."""
    run = gen.Tokens(position=5 + index, ids=[100 + index], text=PIECES[index % len(PIECES)])
    if logprobs is not None:
        top = [gen.Alternative(id=200 + rank, logprob=-1.5 - rank) for rank in range(logprobs)]
        run.logprobs.append(gen.TokenLogprobs(logprob=-0.5, top=top))
    return gen.GenerateResponse(tokens=run)


def finished() -> gen.GenerateResponse:
    """The last event, of a request that was handed off over shm."""
    timeline = gen.Timeline(
        ttft_ms=50.0,
        tpot_ms=10.0,
        total_ms=70.5,
        router_ms=1.0,
        queue_ms=2.0,
        prefill_ms=47.0,
        transfer_ms=3.0,
        transfer_exposed_ms=0.5,
        first_step_wait_ms=1.5,
        decode_ms=18.0,
        attempts=1,
        handoffs=1,
        prefill_worker="prefill-0",
        decode_worker="decode-0",
        path=gen.PATH_DISAGGREGATED,
        transport="shm",
        transfer_bytes=368_640,
        transfer_blocks=1,
    )
    usage = gen.Usage(prompt_tokens=5, output_tokens=3)
    return gen.GenerateResponse(
        finished=gen.Finished(
            reason=gen.FINISH_REASON_EOS, usage=usage, timeline=timeline, slo=gen.SloOutcome(ttft_kept=True)
        )
    )


class Double:
    """What it got, and what it is told to do: fail with `error` after `after` tokens, or go on for ever."""

    def __init__(self) -> None:
        self.requests: list[gen.GenerateRequest] = []
        self.tokenized: list[gen.TokenizeRequest] = []
        self.error: errors.BatonError | None = None
        self.after = 0
        self.endless = False
        self.silent = False
        self.received = asyncio.Event()
        self.cancelled = asyncio.Event()
        self.address = ""

    async def Generate(self, request: gen.GenerateRequest, context: Any) -> AsyncIterator[gen.GenerateResponse]:
        self.requests.append(request)
        self.received.set()
        done = False
        try:
            if self.error is not None and self.after == 0:
                await abort(context, self.error)
            yield accepted()
            logprobs = request.logprobs if request.HasField("logprobs") else None
            for index in range(1_000_000 if self.endless else len(PIECES)):
                if self.error is not None and index == self.after:
                    await abort(context, self.error)
                yield tokens(index, logprobs=logprobs)
                if self.endless:
                    await asyncio.sleep(0.01)
            if not self.silent:
                yield finished()
            done = True
        finally:  # a cancel can also come as the generator's close, while an event is being written
            if not done:
                self.cancelled.set()

    async def Tokenize(self, request: gen.TokenizeRequest, context: Any) -> gen.TokenizeResponse:
        self.tokenized.append(request)
        if self.error is not None:
            await abort(context, self.error)
        return gen.TokenizeResponse(ids=[1, 2, 3], text=request.prompt or "rendered")

    async def ListModels(self, request: gen.ListModelsRequest, context: Any) -> gen.ListModelsResponse:
        model = gen.ModelInfo(
            name="tiny", context_tokens=64, vocabulary_size=99, fingerprint="f00", prefill_workers=1, decode_workers=2
        )
        return gen.ListModelsResponse(models=[model])


DEGRADED = "tiny: no decode worker; only requests for a single token are served"


class AdminDouble:
    """One prefill worker, and a router's status."""

    async def ListWorkers(self, request: Any, context: Any) -> admin_pb2.ListWorkersResponse:
        worker = admin_pb2.WorkerInfo(
            process=worker_pb2.ProcessId(name="prefill-0", incarnation="i-2", address="127.0.0.1:10"),
            roles=[worker_pb2.ROLE_PREFILL],
            model="tiny",
            capacity=worker_pb2.Capacity(blocks=128, max_sequences=4),
            transports=["shm", "tcp"],
            attached=True,
            lease_left_ms=4200.0,
            load=worker_pb2.LoadReport(waiting=1, running=2, held_blocks=3),
            attempts=3,
        )
        return admin_pb2.ListWorkersResponse(workers=[worker], degraded=[DEGRADED])

    async def Explain(self, request: admin_pb2.ExplainRequest, context: Any) -> admin_pb2.ExplainResponse:
        if request.request_id != "known":
            await abort(context, errors.NotFound(f"no request {request.request_id!r} is remembered here"))
        candidates = [
            admin_pb2.Candidate(worker="prefill-0", way="prefill", feasible=True, ttft_ms=120.0, load=3),
            admin_pb2.Candidate(worker="decode-0", way="direct", note="ttft", load=0.5),
        ]
        placement = admin_pb2.Placement(
            step="prompt", chosen="prefill-0 (prefill)", reason="soonest", meets=True, ttft_ms=120.0, others=2
        )
        placement.candidates.extend(candidates)
        return admin_pb2.ExplainResponse(placements=[placement])

    async def GetStatus(self, request: Any, context: Any) -> admin_pb2.GetStatusResponse:
        pool = admin_pb2.PoolStatus(blocks=10, free=7, held=1, cached=1, quarantined=1)
        return admin_pb2.GetStatusResponse(
            degraded=[DEGRADED],
            process=PROCESS,
            pool=pool,
            live={"requests": 2},
            counters={"late_messages": 1},
            resident_bytes=50_000_000,
        )


@asynccontextmanager
async def serving(double: Double) -> AsyncIterator[Double]:
    """The double behind a real gRPC server on a free port."""
    server = await start_server(
        "127.0.0.1:0",
        [
            service(generation_pb2_grpc.add_GenerationServicer_to_server, double, "Generation"),
            service(admin_pb2_grpc.add_AdminServicer_to_server, AdminDouble(), "Admin"),
        ],
    )
    await server.set_ready(True)
    double.address = server.address
    try:
        yield double
    finally:
        await server.stop(0)


@asynccontextmanager
async def serving_half() -> AsyncIterator[str]:
    """The address of a server without any service of ours."""
    server = grpc.aio.server()
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(0)
