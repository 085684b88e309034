"""`baton up`: a whole cluster on this machine."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass

from cyclopts import Parameter

from baton.cli.flags import debug_errors, run

# The names of choices stand in annotations that the flag class inherits as text, looked up here.
from baton.config import (  # noqa: F401
    EngineChoice,
    KernelChoice,
    KvChoice,
    PathChoice,
    TransportChoice,
    WeightChoice,
)
from baton.launch.cluster import ClusterConfig, LocalCluster, LogFormat, LogLevel  # noqa: F401
from baton.launch.lifetime import stop_on_signals


@Parameter(name="*")
@dataclass(frozen=True, slots=True, kw_only=True)
class UpFlags(ClusterConfig):
    """The cluster's settings as flags."""


def up(*, config: UpFlags = UpFlags()) -> None:
    """Start a local cluster: a router, prefill workers and decode workers, each a process.

    Prints one line when it is ready, and stops all of it on Ctrl-C.

    A worker that dies is reported and not started again; when the router dies, the cluster stops.
    """
    debug_errors(config.log_level)
    model = simulated_name(config.model) if config.engine == "simulated" else fetch(config.model)
    with contextlib.suppress(asyncio.CancelledError):  # a signal's, and the cluster is down by now
        run(lambda: _serve(config, model))


def fetch(model: str) -> str:
    """Makes sure of the model's files before any worker starts, once and with a progress bar. Returns its name."""
    from baton.engine.files.models import resolve

    return resolve(model).name


def simulated_name(model: str) -> str:
    """The same for a simulated model, whose files only say what it is like, if it has any."""
    from baton.engine.simulated import BYTES_MODEL, PREFIX

    return PREFIX + (model if model == BYTES_MODEL else fetch(model))


async def _serve(config: ClusterConfig, model: str) -> None:
    this = asyncio.current_task()
    assert this is not None
    stop_on_signals(this.cancel)
    async with LocalCluster(config) as cluster:
        pools = f"{config.prefill} prefill, {config.decode} decode, {model}"
        if config.colocated:
            pools = f"{config.colocated} colocated, {model}"
        print(f"baton ready: {cluster.address} ({pools})", flush=True)
        await cluster.wait()
