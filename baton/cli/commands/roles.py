"""`baton router`, `baton prefill`, `baton decode`: one role, one process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from cyclopts import Parameter

from baton.cli.flags import ProcessFlags

# The last name stands in annotations that the flag classes inherit as text, which are looked up in this module.
from baton.config import (  # noqa: F401
    EngineChoice,
    KernelChoice,
    KvChoice,
    PathChoice,
    RoleName,
    RouterConfig,
    TransportChoice,
    WeightChoice,
    WorkerConfig,
)
from baton.launch.lifetime import announce, serve


@Parameter(name="*")
@dataclass(frozen=True, slots=True, kw_only=True)
class RouterFlags(RouterConfig):
    """The router's settings as flags."""


@Parameter(name="*")
@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillFlags(WorkerConfig):
    """A worker's settings as flags, all but its role."""

    roles: Annotated[frozenset[RoleName], Parameter(parse=False)] = frozenset({"prefill"})


@Parameter(name="*")
@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeFlags(WorkerConfig):
    """A worker's settings as flags, all but its role."""

    roles: Annotated[frozenset[RoleName], Parameter(parse=False)] = frozenset({"decode"})


def router(*, config: RouterFlags = RouterFlags(), process: ProcessFlags = ProcessFlags()) -> None:  # noqa: B008
    """Run the router: what clients talk to, and what workers join."""
    process.prepare("router")
    from router.app import run

    serve(
        lambda ready, stop: run(config, on_ready=ready, stop=stop),
        lambda address: announce(address, "router", process.ready_fd),
    )


def prefill(*, config: PrefillFlags = PrefillFlags(), process: ProcessFlags = ProcessFlags()) -> None:  # noqa: B008
    """Run one prefill worker: it reads prompts and builds their KV cache."""
    _work("prefill", config, process)


def decode(*, config: DecodeFlags = DecodeFlags(), process: ProcessFlags = ProcessFlags()) -> None:  # noqa: B008
    """Run one decode worker: it takes over KV caches and produces tokens."""
    _work("decode", config, process)


def _work(role: RoleName, config: WorkerConfig, process: ProcessFlags) -> None:
    process.prepare(role)
    from baton.launch.worker import run

    serve(
        lambda ready, stop: run(config, on_ready=ready, stop=stop),
        lambda address: announce(address, role, process.ready_fd),
    )
