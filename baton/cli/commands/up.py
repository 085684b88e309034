"""`baton up`: a whole cluster on this machine."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass

from baton.cli.flags import as_flags, debug_errors, run
from baton.launch.cluster import ClusterConfig, LocalCluster
from baton.launch.lifetime import stop_on_signals


@as_flags()
@dataclass(frozen=True, kw_only=True)
class UpFlags(ClusterConfig):
    """A cluster's settings."""


def up(*, config: UpFlags = UpFlags()) -> None:
    """Start a local cluster: a router, prefill workers and decode workers, each a process.

    Prints one line when it is ready, and stops all of it on Ctrl-C.

    A worker that dies is reported and not started again; when the router dies, the cluster stops.
    """
    debug_errors(config.log_level)
    model = simulated_name(config.model) if config.engine == "simulated" else fetch(config.model)
    with contextlib.suppress(asyncio.CancelledError):  # by a signal; the cluster is down by now
        run(lambda: _serve(config, model))


def fetch(model: str) -> str:
    """Makes sure of the model's files, once and with a progress bar, before any worker starts. Returns its name."""
    from baton.engine.files.models import resolve

    return resolve(model).name


def simulated_name(model: str) -> str:
    """The same for a simulated model, of which only the metadata is used, if it has files at all."""
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
