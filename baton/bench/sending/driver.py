"""Connects to the target, sends a plan on time and records the replies, with as little work per message as gRPC allows.

Open loop: a request is sent when it is due, whatever happened to those before it. Requests are built while none is due
and sent as bytes. A message is stamped when the loop gets it. Failures are parsed at the end: refusals come in bursts,
and parsing one would delay the next.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import Any

import grpc

from baton.bench.schedule.config import LoadConfig
from baton.bench.schedule.plan import LoadPlan, Planned, PromptSource
from baton.bench.sending.probe import ClientLoad, Probe
from baton.bench.sending.records import OK, Record
from baton.client.client import deadline_of
from baton.client.reports import ModelInfo
from baton.client.types import Accepted, Finished, RequestOptions
from baton.client.wire import event_from_wire, model_from_wire, request_to_wire
from baton.errors import ConfigError, Retryable, Unavailable
from baton.rpc.net import cancelling, open_client_channel, parse_address
from baton.rpc.status import call, from_rpc_error
from baton.v1 import generation_pb2, generation_pb2_grpc

GENERATE = "/baton.v1.Generation/Generate"
CONNECT_S = 10.0
LEAD_S = 0.2
"""From the start to the plan's time 0: time to build the first requests."""
AHEAD = 256
BUILD_S = 0.002
"""Requests are built ahead only while none is due within this time."""
TICK_S = 0.5


@dataclass(frozen=True, slots=True)
class LoadTarget:
    """A model at an address, over a fixed number of open connections."""

    address: str
    model: ModelInfo
    channels: tuple[grpc.aio.Channel, ...]


@dataclass(slots=True)
class Progress:
    planned: int
    elapsed_s: float = 0.0
    sent: int = 0
    ended: int = 0
    failed: int = 0
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class LoadRun:
    """A finished run: a record for each planned request, in the plan's order, and the client's health. `zero` is
    `time.perf_counter` at the plan's time 0."""

    plan: LoadPlan
    records: tuple[Record, ...]
    client: ClientLoad
    zero: float = 0.0


Watcher = Callable[[Progress], None]


@contextlib.asynccontextmanager
async def connect(address: str, config: LoadConfig) -> AsyncIterator[LoadTarget]:
    """Every channel has answered a call, so that no request pays for connecting. Raises ConfigError for an impossible
    address or model, Unavailable without a server at the address."""
    parse_address(address, "server")
    channels = tuple(open_client_channel(address) for _ in range(config.channels))
    try:
        for channel in channels:
            models = await _models(channel, address)
        yield LoadTarget(address, _chosen(models, config.model), channels)
    finally:
        for channel in channels:
            await channel.close()


async def _models(channel: grpc.aio.Channel, address: str) -> list[ModelInfo]:
    stub: generation_pb2_grpc.GenerationAsyncStub = generation_pb2_grpc.GenerationStub(channel)
    try:
        answer = await call(stub.ListModels(generation_pb2.ListModelsRequest()), CONNECT_S)
    except Unavailable as error:
        raise Unavailable(f"cannot reach {address}: {error}") from None
    return [model_from_wire(entry) for entry in answer.models]


def _chosen(models: list[ModelInfo], name: str) -> ModelInfo:
    if not models:
        raise Unavailable("no worker has joined the router yet")
    found = [entry for entry in models if name in ("", entry.name)]
    if len(found) != 1:
        known = ", ".join(entry.name for entry in models)
        raise ConfigError(f"model: {name!r} is not served; there is {known}" if name else f"model: which of {known}?")
    return found[0]


async def run_plan(target: LoadTarget, plan: LoadPlan, config: LoadConfig, watch: Watcher | None = None) -> LoadRun:
    """Returns when every request has ended, each by its deadline. Calls `watch` twice a second."""
    driver = _Driver(target, plan, config)
    probe = Probe()
    with _undisturbed():
        watching = asyncio.create_task(driver.watch(watch)) if watch else None
        async with cancelling(*filter(None, (asyncio.create_task(probe.run()), watching))):
            records = await driver.run()
    if watch:
        watch(driver.progress)
    return LoadRun(plan, records, probe.load, driver.zero)


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Keeps the garbage collector away from all existing objects: its pauses would add to the client's lag."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


class _Driver:
    def __init__(self, target: LoadTarget, plan: LoadPlan, config: LoadConfig) -> None:
        self._plan, self._config, self._model = plan, config, target.model.name
        self._prompts = PromptSource(config.seed, target.model.vocabulary_size)
        reply = generation_pb2.GenerateResponse.FromString
        calls: list[Any] = [channel.unary_stream(GENERATE, None, reply) for channel in target.channels]
        self._calls = itertools.cycle(calls)
        self.zero = 0.0
        self.progress = Progress(len(plan.requests))
        self._failures: list[tuple[Record, grpc.aio.AioRpcError]] = []

    def _now(self) -> float:
        return time.perf_counter() - self.zero

    async def run(self) -> tuple[Record, ...]:
        self.zero = time.perf_counter() + LEAD_S
        records = []
        async with asyncio.TaskGroup() as group:
            async for planned, body in self._due():
                record = Record(planned)
                records.append(record)
                group.create_task(self._send(record, body))
        for record, error in self._failures:
            failure = from_rpc_error(error)
            record.status, record.message = error.code().name, str(failure)
            if isinstance(failure, Retryable):
                record.constraint = failure.constraint
        return tuple(records)

    async def _due(self) -> AsyncIterator[tuple[Planned, bytes]]:
        """Yields each request with its bytes when it is due."""
        ready: deque[tuple[Planned, bytes]] = deque()
        upcoming = iter(self._plan.requests)
        left = len(self._plan.requests)
        while left or ready:
            while left and len(ready) < AHEAD and (not ready or ready[0][0].at_s - self._now() > BUILD_S):
                planned = next(upcoming)
                ready.append((planned, self._build(planned)))
                left -= 1
                await asyncio.sleep(0)  # lets messages be stamped before the next one is built
            wait_s = ready[0][0].at_s - self._now()
            if wait_s > 0:
                await asyncio.sleep(math.ceil(wait_s * 1e3) / 1e3)  # the loop's clock has milliseconds: round up
            else:
                yield ready.popleft()

    def _build(self, planned: Planned) -> bytes:
        options: RequestOptions = {
            "token_ids": self._prompts.ids(planned),
            "model": self._model,
            "max_tokens": planned.output_tokens,
            "temperature": 0.0,
            "ignore_eos": self._config.ignore_eos,
            **planned.traffic.options(),
        }
        return request_to_wire(None, options).SerializeToString()

    async def _send(self, record: Record, body: bytes) -> None:
        progress = self.progress
        progress.sent += 1
        record.sent_s = self._now()
        stream = next(self._calls)(body, timeout=deadline_of(self._config.timeout_s))
        try:
            async for message in stream:
                now = self._now()
                if message.WhichOneof("event") == "tokens":
                    count = len(message.tokens.ids)
                    if count:
                        record.stamps.append(now)
                        record.counts.append(count)
                        progress.tokens += count
                else:
                    _note(record, message)
        except grpc.aio.AioRpcError as error:
            self._failures.append((record, error.with_traceback(None)))  # its traceback would keep frames alive
            progress.failed += 1
        finally:
            record.end_s = self._now()
            stream.cancel()  # no effect on an ended call
            progress.ended += 1

    async def watch(self, watcher: Watcher) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            self.progress.elapsed_s = max(0.0, self._now())
            watcher(self.progress)


def _note(record: Record, message: generation_pb2.GenerateResponse) -> None:
    match event_from_wire(message):
        case Accepted() as accepted:
            record.accepted = accepted
        case Finished() as finished:
            record.finished, record.status = finished, OK
