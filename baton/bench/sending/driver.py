"""Sends a plan on time and writes down what comes back, with as little work per message as gRPC allows.

Open loop: a request goes out when it is due, whatever became of those before it. Requests are built while nothing is
due and go out as bytes; a message is stamped as soon as the loop has it, and what a failure says is read when all is
over: refusals come in bursts, and each would wait for those before it to be read.
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

from baton.bench.config import LoadConfig
from baton.bench.schedule.plan import LoadPlan, Planned, Prompts
from baton.bench.sending.probe import ClientLoad, Probe
from baton.bench.sending.records import OK, Record
from baton.bench.sending.target import LoadTarget
from baton.client.types import Accepted, Finished, RequestOptions
from baton.client.wire import event_from_wire, request_to_wire
from baton.errors import Retryable
from baton.rpc.net import cancelling
from baton.rpc.status import from_rpc_error
from baton.v1 import generation_pb2

GENERATE = "/baton.v1.Generation/Generate"
LEAD_S = 0.2
"""From the start to the first moment at which a request can be due: time to build the first ones."""
AHEAD = 256
BUILD_S = 0.002
"""A request is built ahead only while the next is not due within this."""
TICK_S = 0.5


@dataclass(slots=True)
class Progress:
    """Where a run stands, for who watches it."""

    planned: int
    elapsed_s: float = 0.0
    sent: int = 0
    ended: int = 0
    failed: int = 0
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class LoadRun:
    """A finished run: a record for each planned request, in the plan's order, and how the client did.

    `zero` is what `time.perf_counter` said when the plan's time began.
    """

    plan: LoadPlan
    records: tuple[Record, ...]
    client: ClientLoad
    zero: float = 0.0


Watcher = Callable[[Progress], None]


async def run_plan(target: LoadTarget, plan: LoadPlan, config: LoadConfig, watch: Watcher | None = None) -> LoadRun:
    """Returns when every request has ended; each ends by its deadline. `watch` is called twice a second."""
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
    """What exists already is no longer walked by the garbage collector, whose pauses would be the client's lag."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


class _Driver:
    def __init__(self, target: LoadTarget, plan: LoadPlan, config: LoadConfig) -> None:
        self._plan, self._config, self._model = plan, config, target.model.name
        self._prompts = Prompts(config.seed, target.model.vocabulary_size)
        self._calls: Iterator[Any] = itertools.cycle(
            [
                channel.unary_stream(GENERATE, None, generation_pb2.GenerateResponse.FromString)
                for channel in target.channels
            ]
        )
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
            _note_failure(record, error)
        return tuple(records)

    async def _due(self) -> AsyncIterator[tuple[Planned, bytes]]:
        """Each request with its bytes, when it is due."""
        ready: deque[tuple[Planned, bytes]] = deque()
        upcoming = iter(self._plan.requests)
        left = len(self._plan.requests)
        while left or ready:
            while left and len(ready) < AHEAD and (not ready or ready[0][0].at_s - self._now() > BUILD_S):
                planned = next(upcoming)
                ready.append((planned, self._build(planned)))
                left -= 1
                await asyncio.sleep(0)  # messages that came meanwhile are stamped before the next one is built
            wait_s = ready[0][0].at_s - self._now()
            if wait_s > 0:
                await asyncio.sleep(math.ceil(wait_s * 1e3) / 1e3)  # the loop's clock has milliseconds; never early
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
        stream = next(self._calls)(body, timeout=self._config.timeout_s)
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
            self._failures.append((record, error.with_traceback(None)))  # which would hold all that it has passed
            progress.failed += 1
        finally:
            record.end_s = self._now()
            stream.cancel()  # does nothing to a call that is over
            progress.ended += 1

    async def watch(self, watcher: Watcher) -> None:
        """Until cancelled."""
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


def _note_failure(record: Record, error: grpc.aio.AioRpcError) -> None:
    failure = from_rpc_error(error)
    record.status = error.code().name
    record.message = str(failure)
    if isinstance(failure, Retryable):
        record.constraint = failure.constraint
