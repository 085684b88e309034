"""Whole clusters of real processes, one per module and shape, and what must hold when a test is over."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import psutil
import pytest
import pytest_asyncio
import trustme

from baton.client import Client, ProcessStatus
from baton.config import RoleName
from baton.errors import Unavailable
from baton.launch.child import Sink
from baton.launch.cluster import PROGRAM, ClusterConfig, LocalCluster

VOCABULARY = 49_152
SETTLE_S = 20.0


@dataclass(frozen=True, slots=True)
class Running:
    """A cluster with a client of its router."""

    cluster: LocalCluster
    client: Client

    async def statuses(self, router: bool = False) -> list[ProcessStatus]:
        """What each live worker holds, and the router if asked for; one that has just died is none any more."""
        found = []
        for child in self.cluster.processes:
            if (child.role == "router" and not router) or not child.running:
                continue
            try:
                async with Client(child.address) as client:
                    found.append(await client.status())
            except Unavailable:
                async with asyncio.timeout(SETTLE_S):
                    await child.wait_exited()  # or it is a live worker that does not answer
        return found


@asynccontextmanager
async def running(
    *worker_flags: str,
    role_flags: Mapping[RoleName, Sequence[str]] | None = None,
    router_flags: Sequence[str] = (),
    sink: Sink | None = None,
    program: Sequence[str] = PROGRAM,
    **options: object,
) -> AsyncIterator[Running]:
    """A cluster on a free port, with every prompt over both pools unless told otherwise; none of its processes is left
    afterwards. The flags are for each worker, or for those of one role."""
    path = "adaptive" if options.get("colocated") else "disaggregated"
    fields = {"listen": "127.0.0.1:0", "pool_tokens": 12_288, "path": path} | options
    config = ClusterConfig(**fields)  # type: ignore[arg-type]
    flags = {role: (*worker_flags, *(role_flags or {}).get(role, ())) for role in get_args(RoleName)}
    async with LocalCluster(
        config, worker_flags=flags, router_flags=router_flags, sink=sink, program=program
    ) as cluster:
        pids = [child.pid for child in cluster.processes]
        async with Client(cluster.address) as client:
            yield Running(cluster, client)
    assert not [pid for pid in pids if psutil.pid_exists(pid)], "a process outlived its cluster"


@pytest_asyncio.fixture(scope="package", loop_scope="package")
async def plain() -> AsyncIterator[Running]:
    """One worker of each role as users start them, for all modules whose tests leave it as they find it."""
    async with running(prefill=1, decode=1, chunk_tokens=128) as started:
        yield started


@pytest_asyncio.fixture(scope="package", loop_scope="package")
async def exact_pairs() -> AsyncIterator[Running]:
    """Two workers of each role that compute in float32: greedy output equals the reference's."""
    async with running(prefill=2, decode=2, dtype="float32", chunk_tokens=128) as started:
        yield started


def _certificates(folder: Path) -> list[str]:
    authority = trustme.CA()
    issued = authority.issue_cert("worker.test")
    files = {name: str(folder / f"{name}.pem") for name in ("cert", "key", "ca")}
    issued.cert_chain_pems[0].write_to_path(files["cert"])
    issued.private_key_pem.write_to_path(files["key"])
    authority.cert_pem.write_to_path(files["ca"])
    return [word for name, path in files.items() for word in (f"--tcp-tls-{name}", path)]


@pytest_asyncio.fixture(scope="package", loop_scope="package")
async def native_over_tcp(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Running]:
    """The native kernels in bf16, and tcp with all that it can do."""
    own: dict[RoleName, list[str]] = {"prefill": ["--tcp-connections", "3"], "decode": ["--tcp-listen", "[::1]:0"]}
    files = _certificates(tmp_path_factory.mktemp("tls"))
    native: dict[str, Any] = {"weights": "bf16", "kernels": "native", "dtype": "bfloat16", "chunk_tokens": 256}
    async with running("--checksums", *files, role_flags=own, transport="tcp", **native) as started:
        yield started


LIVE_NAMES = {
    "prefill": ("attempts", "deliveries"),
    "decode": ("residents", "grants", "aborting"),
    "router": ("requests", "attempts", "cancelling"),
}
GROWING = ("tasks", "threads", "sessions")
"""What a process has some of when it is idle, however many requests it has seen."""


def held(status: ProcessStatus) -> dict[str, int]:
    """What a process that has nothing to do should not have. A count that it does not tell of is an error."""
    found = {name: status.live[name] for role in status.roles or ("router",) for name in LIVE_NAMES[role]}
    if status.roles:
        assert status.pool is not None, "a worker has a pool"
        found |= {"held blocks": status.pool.held, "quarantined blocks": status.pool.quarantined}
    return {name: count for name, count in found.items() if count}


async def settled(cluster: Running) -> None:
    """Waits until router and workers have let go of everything; then the workers' books must balance."""
    async with asyncio.timeout(SETTLE_S):
        while any(held(status) for status in await cluster.statuses(router=True)):
            await asyncio.sleep(0.05)
    for status in await cluster.statuses():
        assert status.pool is not None
        assert status.pool.integrity_error == "", status.pool.integrity_error


async def idle_counts(cluster: Running) -> dict[str, dict[str, int]]:
    """By process: the tasks, threads and sessions that stay when nothing is left to do."""
    await settled(cluster)
    return {s.name: {name: s.live[name] for name in GROWING} for s in await cluster.statuses(router=True)}


async def no_growth(cluster: Running, before: dict[str, dict[str, int]], writers: int = 0) -> None:
    """Waits until no process has more than before of what `idle_counts` counts: a task may take a moment to end.
    `writers` are threads that a prefill worker may still make, to write to so many more pairs at once than before."""
    before = {
        process: counts | {"threads": counts["threads"] + writers * process.startswith("prefill")}
        for process, counts in before.items()
    }
    grown: object = None
    try:
        async with asyncio.timeout(SETTLE_S):
            while grown := _grown(before, await idle_counts(cluster)):
                await asyncio.sleep(0.1)
    except TimeoutError:
        raise AssertionError(f"more than before: {grown}") from None


def _grown(before: dict[str, dict[str, int]], now: dict[str, dict[str, int]]) -> list[str]:
    return [
        f"{process}: {name} {before[process][name]} -> {count}"
        for process, counts in now.items()
        for name, count in counts.items()
        if count > before[process][name]
    ]


def prompt_of(length: int, seed: int = 0) -> list[int]:
    """Random ordinary tokens, the same for the same arguments."""
    generator = random.Random(f"{length}/{seed}")
    return [generator.randrange(100, VOCABULARY) for _ in range(length)]
