"""A whole cluster on this machine: a router and its workers, each a process of its own.

    starting -> ready -> stopping -> stopped      a failure while starting goes to stopping at once

Every child dies with the thread that started it (PR_SET_PDEATHSIG), so enter a cluster in a thread that outlives it,
as the main thread does. Workers that die are reported and not started again, which is an orchestrator's task; `add` is
for that. When the router dies, the cluster is over.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Self

from baton.children import PYTHON, child_environment
from baton.config import (
    CLUSTER,
    DEFAULT_LISTEN,
    MODEL,
    PROCESS,
    LogLevel,
    LogSettings,
    RoleName,
    RoutingSettings,
    WeightChoice,
    WorkerSettings,
    require,
    require_at_least,
    require_choice,
    require_durations,
    settings_of,
)
from baton.errors import Unavailable
from baton.launch.child import Child, Sink
from baton.rpc.net import cancelling, format_address, parse_address

ROUTER = "router"
PROGRAM = (*PYTHON, "baton.cli")
STOP_S = 5.0
"""From the first SIGTERM to SIGKILL."""
ROUTER_STOP_S = 2.0
"""How long the router stays for workers that are leaving."""


@dataclass(frozen=True, kw_only=True)
class ClusterConfig(WorkerSettings, RoutingSettings, LogSettings):
    """A local cluster. The settings of a worker are those of all its workers, except where a name says the role."""

    prefill: Annotated[int, CLUSTER] = 1
    """Prefill workers."""
    decode: Annotated[int, CLUSTER] = 1
    """Decode workers."""
    colocated: Annotated[int, CLUSTER] = 0
    """Workers that do both phases, in place of the two pools; 0 for the two pools."""
    listen: Annotated[str, CLUSTER] = DEFAULT_LISTEN
    """HOST:PORT of the router; port 0 takes any free one."""
    start_s: Annotated[float, CLUSTER] = 60.0
    """Seconds until every process must be ready."""
    prefill_weights: Annotated[WeightChoice | None, MODEL] = None
    """--weights of prefill workers alone, which are bound by arithmetic."""
    decode_weights: Annotated[WeightChoice | None, MODEL] = None
    """--weights of decode workers alone, which are bound by memory bandwidth."""
    pin: Annotated[bool, PROCESS] = False
    """Keep each worker on one core: prefill workers from the first core on, decode workers from the last back."""
    log_level: Annotated[LogLevel, PROCESS] = "warning"

    def __post_init__(self) -> None:
        WorkerSettings.__post_init__(self)
        RoutingSettings.__post_init__(self)
        require_at_least(self, 1, "prefill", "decode")
        require_at_least(self, 0, "colocated")
        require(not self.colocated or self.path == "adaptive", "path", "colocated workers know only one, direct")
        for field in ("prefill_weights", "decode_weights"):
            if getattr(self, field) is not None:
                require_choice(field, getattr(self, field), WeightChoice)
        require_durations(self, "start_s")
        require(not (self.pin and self.threads > 1), "threads", "with --pin each worker has one core, so 1")
        parse_address(self.listen, "listen")

    def of_worker(self, role: RoleName) -> dict[str, object]:
        """Settings of a worker of this role, by the names of `WorkerConfig`."""
        weights = self.prefill_weights if role == "prefill" else self.decode_weights
        shared = {name: getattr(self, name) for name in settings_of(WorkerSettings, role)}
        return shared | {"weights": weights or self.weights}


class LocalCluster:
    """`async with LocalCluster(ClusterConfig(...)) as cluster`: ready inside the block, gone after it.

    Entering raises ConfigError or Unavailable with the reason of the first process that failed. Leaving stops every
    process within `STOP_S`, also when it is cancelled. `sink` gets the processes' output, line by line; the workers of
    a role get its `worker_flags` besides those of the config, the router gets `router_flags`. `program` runs a role,
    whose name and flags follow it.
    """

    def __init__(
        self,
        config: ClusterConfig,
        *,
        sink: Sink | None = None,
        worker_flags: Mapping[RoleName, Sequence[str]] | None = None,
        router_flags: Sequence[str] = (),
        program: Sequence[str] = PROGRAM,
    ) -> None:
        self.config = config
        self.address = ""
        self._sink = sink or _to_stderr
        self._worker_flags, self._router_flags = worker_flags or {}, router_flags
        self._program = tuple(program)
        self._children: list[Child] = []
        self._watchers: list[asyncio.Task[None]] = []
        self._router_gone: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    @property
    def processes(self) -> tuple[Child, ...]:
        """The router and then the workers, each with name, role, pid and address, dead or alive."""
        return tuple(self._children)

    async def __aenter__(self) -> Self:
        try:
            async with asyncio.timeout(self.config.start_s):
                await self._start()
        except TimeoutError:
            late = [child.name for child in self._children if not child.address]
            await self.stop()
            raise Unavailable(f"{', '.join(late)} not ready within {self.config.start_s:g} s") from None
        except BaseException:
            await self.stop()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def wait(self) -> None:
        """Lasts as long as the router; then raises Unavailable with the cause of its end."""
        raise Unavailable(f"the router {await asyncio.shield(self._router_gone)}")

    async def add(self, name: str, role: RoleName) -> Child:
        """Starts one more worker of this role, and returns it once it is ready. Only inside the block, which ends the
        worker like the others. Raises as entering does; a worker that is late by then is killed."""
        index = sum(child.role == role for child in self._children)
        worker = await self._spawn(name, role, self._flags_of(role, index))
        try:
            async with asyncio.timeout(self.config.start_s):
                await worker.wait_ready()
        except TimeoutError:
            worker.kill()
            raise Unavailable(f"{name} not ready within {self.config.start_s:g} s") from None
        self._watchers.append(asyncio.create_task(self._watch(worker)))
        return worker

    async def stop(self) -> None:
        """SIGTERM to the workers, then to the router; SIGKILL to the rest after `STOP_S`. Idempotent."""
        for watcher in self._watchers:
            watcher.cancel()
        workers = [child for child in self._children if child.role != ROUTER]
        try:
            async with asyncio.timeout(STOP_S):
                await _terminate(workers, ROUTER_STOP_S)
                await _terminate([child for child in self._children if child.role == ROUTER], None)
                await _exited(workers, None)
        except TimeoutError:
            late = [child.name for child in self._children if child.running]
            self._sink(f"baton: killed what did not stop within {STOP_S:g} s: {', '.join(late)}")
        finally:
            for child in self._children:
                child.kill()
            await _exited(self._children, STOP_S)

    async def _start(self) -> None:
        path = "direct" if self.config.colocated else self.config.path
        flags = ["--listen", self.config.listen, "--path", path, "--slo", self.config.slo, *self._router_flags]
        router = await self._spawn(ROUTER, ROUTER, flags)
        self.address = dialable(await router.wait_ready())
        workers = [
            await self._spawn(f"{name}-{index}", role, self._flags_of(role, index))
            for name, role, count in _counts(self.config)
            for index in range(count)
        ]
        await _all_ready(router, workers)
        self._watchers = [asyncio.create_task(self._watch(child)) for child in self._children]

    async def _spawn(self, name: str, role: str, flags: Sequence[str]) -> Child:
        command = [*self._program, role, "--name", name, *flags, *self._log_flags()]
        command += ["--parent-pid", str(os.getpid())]
        child = await Child.start(name, role, command, child_environment(), self._sink)
        self._children.append(child)
        return child

    def _log_flags(self) -> list[str]:
        chosen = self.config.log_format
        if chosen == "auto":  # a child writes to a pipe, so it can't tell
            chosen = "console" if sys.stderr.isatty() else "json"
        return ["--log-level", self.config.log_level, "--log-format", chosen]

    def _flags_of(self, role: RoleName, index: int) -> list[str]:
        flags = ["--router", self.address]
        for name, value in self.config.of_worker(role).items():
            flag = f"--{name.replace('_', '-')}"
            if isinstance(value, bool):
                flags += [flag] * value
            else:
                flags += [flag, str(value)]
        if self.config.pin:
            flags += ["--pin", str(core_of(role, index, sorted(os.sched_getaffinity(0))))]
        return [*flags, *self._worker_flags.get(role, ())]

    async def _watch(self, child: Child) -> None:
        """Reports an unexpected death."""
        await child.wait_exited()
        how = child.describe_exit()
        if child.role == ROUTER:
            self._router_gone.set_result(how)
        else:
            self._sink(f"baton: {child.name} (pid {child.pid}) {how}; it is not started again")


def _counts(config: ClusterConfig) -> list[tuple[str, RoleName, int]]:
    """(name, role, count) of the workers. Colocated ones are decode workers, each of which can do both phases."""
    if config.colocated:
        return [("colocated", "decode", config.colocated)]
    return [("prefill", "prefill", config.prefill), ("decode", "decode", config.decode)]


def core_of(role: RoleName, index: int, cores: Sequence[int]) -> int:
    """Prefill workers take the cores from the first on, decode workers from the last back, both round-robin."""
    place = index % len(cores)
    return cores[place] if role == "prefill" else cores[-1 - place]


def dialable(address: str) -> str:
    """The address to dial, on this machine, for a listener on `address`: a wildcard is no destination."""
    host, port = parse_address(address)
    return format_address({"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host), port)


async def _all_ready(router: Child, workers: Sequence[Child]) -> None:
    """Raises the failure of the first process that exits."""
    guard = asyncio.create_task(router.wait_exited())
    waiting = {asyncio.create_task(worker.wait_ready()) for worker in workers}
    async with cancelling(guard, *waiting):
        while waiting:
            done, _ = await asyncio.wait({guard, *waiting}, return_when=asyncio.FIRST_COMPLETED)
            if guard in done:
                raise Unavailable(f"the router {router.describe_exit()}")
            for task in done:
                task.result()
            waiting -= done


async def _terminate(children: Sequence[Child], timeout: float | None) -> None:
    """Without a timeout the caller bounds the wait."""
    for child in children:
        child.terminate()
    await _exited(children, timeout)


async def _exited(children: Sequence[Child], timeout: float | None) -> None:
    waits = [asyncio.create_task(child.wait_exited()) for child in children]
    async with cancelling(*waits):
        if waits:
            await asyncio.wait(waits, timeout=timeout)


def _to_stderr(line: str) -> None:
    with contextlib.suppress(BrokenPipeError):  # without a reader the cluster goes on
        print(line, file=sys.stderr, flush=True)
