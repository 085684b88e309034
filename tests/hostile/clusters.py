"""Cases about whole processes: suspended, frozen, killed, impostors. With the real timeouts."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import grpc

from baton.client import Client
from baton.errors import BatonError, ConfigError
from baton.launch.cluster import PROGRAM
from baton.rpc import net
from tests.cluster.conftest import Running, running
from tests.cluster.test_joining import process, worker
from tests.engine.conftest import make_tiny
from tests.faults.namespaces import why_no_pids
from tests.hostile.pauses import Stream, frozen_client, streams_through
from tests.hostile.rows import Row, at_most, equal

SIMULATED: dict[str, Any] = {"engine": "simulated", "model": "bytes"}
PAUSE_S = 30.0
FROZEN_CLIENT_S = 10.0
SILENT_S = 130.0
STEP_PAUSE_S = 3.0
POISONED = 7
"""The token whose embedding is not a number."""


async def status(address: str) -> Any:
    async with Client(address) as client:
        return await client.status()


async def a_suspended_router() -> list[Row]:
    rows = []
    async with running(**SIMULATED, pool_tokens=65_536, sim_speed=2.0) as cluster:
        for seconds, everyone in ((4.5, False), (PAUSE_S, False), (PAUSE_S, True)):
            who = cluster.cluster.processes if everyone else cluster.cluster.processes[:1]
            errors = await streams_through(cluster, [(who, seconds)], count=8, tokens=3000)
            lost = (await cluster.client.status()).counters.get("workers_lost", 0)
            name = f"{'all processes' if everyone else 'the router'} stopped for {seconds:g} s"
            rows.append(equal(f"{name}: streams lost, of 8", 0, len(errors)))
            rows.append(equal(f"{name}: workers lost", 0, lost))
    return rows


async def a_frozen_client() -> list[Row]:
    async with running(**SIMULATED) as cluster, frozen_client(cluster.cluster.address):
        frozen = time.monotonic()
        while sum(one.live.get("residents", 0) for one in await cluster.statuses()):
            await asyncio.sleep(0.05)
        return [at_most("a frozen client's KV is free after", FROZEN_CLIENT_S + 0.5, time.monotonic() - frozen, "s")]


async def a_silent_stream_behind_another_server() -> list[Row]:
    """One with gRPC's default policy for pings."""

    async def silent(_request: bytes, context: Any) -> None:
        await context.write(b"one")
        await asyncio.Event().wait()

    server = grpc.aio.server()
    handlers: dict[str, Any] = {"Watch": grpc.unary_stream_rpc_method_handler(silent)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("silent", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    ended = "nothing"
    async with net.open_client_channel(f"127.0.0.1:{port}") as channel:
        call: Any = channel.unary_stream("/silent/Watch")(b"")  # type: ignore[arg-type]
        try:
            async with asyncio.timeout(SILENT_S):
                async for _ in call:
                    pass
        except TimeoutError:
            pass
        except grpc.aio.AioRpcError as error:
            ended = f"{error.code().name}: {error.details()}"
        else:
            ended = "the server's own end"
    await server.stop(0)
    return [equal(f"{SILENT_S:g} silent seconds behind a server's default policy end in", "nothing", ended)]


async def a_long_model_name() -> list[Row]:
    rows = []
    async with running(**SIMULATED) as cluster:
        for name in ("m" * 9000, "\U0001f600" * 9000, "\u0000" * 9000):
            try:
                await cluster.client.complete(prompt="hello", model=name, timeout=20)
            except BatonError as error:
                short = type(error).__name__ == "InvalidArgument" and len(str(error)) < 1000
                case = f"a model name of {len(name.encode())} bytes ends in"
                said = f"{type(error).__name__}, {len(str(error))} characters"
                rows.append(Row(case, "InvalidArgument, short", said, short))
    return rows


async def an_impostor() -> list[Row]:
    async with running(**SIMULATED) as cluster:
        router, _, decode = cluster.cluster.processes
        stream, began, said = Stream(cluster.client, 1, 600), time.monotonic(), "nothing"
        try:
            async with process(*worker("decode", router, "--advertise", decode.address, "--name", "impostor")):
                pass
        except ConfigError as error:
            said = str(error)
        told_s = time.monotonic() - began
        await stream.task
        lost = (await status(decode.address)).counters.get("routers_lost", 0)
        told = bool(re.search(r"worker\.address: .* is not impostor's own", said)) and "\n" not in said
        return [
            Row("a worker with another's address is told", "in one line", "in one line" if told else said, told),
            at_most("it is told after", 10.0, told_s, "s"),
            equal("the healthy worker lost a router", 0, lost),
        ]


async def two_containers_of_one_pod() -> list[Row]:
    if why := why_no_pids():
        return [Row("two PID namespaces hand over by", "tcp", f"not tried: {why}", True)]
    apart = (sys.executable, "-m", "tests.faults.namespaces", *PROGRAM)
    async with running(program=apart, **SIMULATED, cost_model="instant") as cluster:
        done = await cluster.client.complete(prompt="a b c" * 20, max_tokens=3, timeout=60)
        return [equal("two PID namespaces hand over by", "tcp", done.finished.timeline.transport)]


async def an_empty_pool() -> list[Row]:
    async with running(**SIMULATED, path="adaptive") as cluster:
        _, prefill, decode = cluster.cluster.processes
        prefill.kill()
        await prefill.wait_exited()
        rows = [await served(cluster, "without a prefill worker a request is served", "direct")]
        rows.append(equal("and readiness is", "serving", await cluster.client.health("readiness")))
        decode.kill()
        await decode.wait_exited()
        rows.append(await served(cluster, "without any worker it is refused by", "Unavailable"))
    return rows


async def served(cluster: Running, case: str, wanted: str) -> Row:
    """The way in which a request was served, or its error."""
    await asyncio.sleep(0.5)  # a killed worker's connection breaks at once
    try:
        done = await cluster.client.complete(token_ids=[1, 2, 3], max_tokens=5, timeout=20)
    except BatonError as error:
        return equal(case, wanted, type(error).__name__)
    return equal(case, wanted, done.finished.timeline.path.value)


async def a_worker_that_dies_or_stops() -> list[Row]:
    """Under eight streams over two workers of each role, with idle pools."""
    rows = []
    for how, number, bound_s in (("killed", signal.SIGKILL, 1.0), ("stopped", signal.SIGSTOP, 2.5)):
        async with running(**SIMULATED, prefill=2, decode=2) as cluster:
            streams = [Stream(cluster.client, seed, 400) for seed in range(8)]
            while not all(stream.under_way for stream in streams):
                await asyncio.sleep(0.01)
            victim = next(child for child in cluster.cluster.processes if child.name == "decode-0")
            os.kill(victim.pid, number)
            ends = await asyncio.gather(*(stream.task for stream in streams), return_exceptions=True)
            victim.kill()
        lost = sum(isinstance(end, BaseException) for end in ends)
        rows.append(equal(f"a decode worker is {how}: streams lost, of 8", 0, lost))
        rows.append(at_most("and the longest pause is", bound_s, max(max(stream.gaps) for stream in streams), "s"))
    return rows


async def a_step_that_spans_a_pause() -> list[Row]:
    """What a decode worker promises per token, before and after it was stopped in the middle of a step."""
    async with running(**SIMULATED) as cluster:
        decode = cluster.cluster.processes[-1]

        async def promised() -> float:
            times = []
            for seed in range(5):
                done = await cluster.client.complete(token_ids=[9] * 64, seed=seed, max_tokens=30, timeout=30)
                times.append(done.accepted.predicted_tpot_ms or 0.0)
            return statistics.median(times)

        before = await promised()
        stream = Stream(cluster.client, 1, 800)
        while not stream.under_way:
            await asyncio.sleep(0.01)
        os.kill(decode.pid, signal.SIGSTOP)
        await asyncio.sleep(STEP_PAUSE_S)
        os.kill(decode.pid, signal.SIGCONT)
        await stream.task
        name = f"TPOT promised after a pause of {STEP_PAUSE_S:g} s, over that before"
        return [at_most(name, 1.5, await promised() / before)]


def write_poisoned(folder: Path) -> None:
    """A random model in which one token is not a number."""
    import torch
    from safetensors.torch import load_file, save_file

    make_tiny(folder, "llama")
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    tensors["model.embed_tokens.weight"][POISONED] = torch.nan
    save_file(tensors, file, {"format": "pt"})


async def logits_that_are_not_finite() -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        write_poisoned(Path(folder))
        async with running(model=folder) as cluster:
            return await poisoned_beside_healthy(cluster)


async def poisoned_beside_healthy(cluster: Running) -> list[Row]:
    async def tokens() -> tuple[int, ...]:
        options: Any = {"max_tokens": 200, "temperature": 0.0, "ignore_eos": True, "timeout": 60}
        return (await cluster.client.complete(token_ids=[20, 21, 22, 23], **options)).token_ids

    alone = await tokens()
    beside = asyncio.create_task(tokens())
    said = []
    for seed in range(5):
        try:
            await cluster.client.complete(token_ids=[20, POISONED, 22], seed=seed, max_tokens=5, timeout=60)
            said.append("served")
        except BatonError as error:
            said.append(f"{type(error).__name__}: {error}")
    wanted = "logits are not finite at position 3"
    return [
        Row("a sequence with NaN ends in", f"Internal: {wanted}", said[0], all(wanted in one for one in said)),
        equal("a stream beside it has its own tokens", True, await beside == alone),
    ]
