"""`baton router`, `baton prefill`, `baton decode`: one role, one process."""

from __future__ import annotations

from dataclasses import dataclass

from baton.cli.flags import ProcessFlags, as_flags
from baton.config import RoleName, RouterConfig, WorkerConfig, settings_of
from baton.launch.lifetime import serve


@as_flags()
@dataclass(frozen=True, kw_only=True)
class RouterFlags(RouterConfig):
    """A router's settings."""


@as_flags(settings_of(WorkerConfig, "prefill"))
@dataclass(frozen=True, kw_only=True)
class PrefillFlags(WorkerConfig):
    """A prefill worker's settings."""

    roles: frozenset[RoleName] = frozenset({"prefill"})


@as_flags(settings_of(WorkerConfig, "decode"))
@dataclass(frozen=True, kw_only=True)
class DecodeFlags(WorkerConfig):
    """A decode worker's settings."""

    roles: frozenset[RoleName] = frozenset({"decode"})


def router(*, config: RouterFlags = RouterFlags(), process: ProcessFlags = ProcessFlags()) -> None:  # noqa: B008
    """Run the router: clients talk to it, and workers join it."""
    process.prepare("router")
    from router.app import run

    serve(lambda ready, stop: run(config, on_ready=ready, stop=stop), "router", process.ready_fd)


def prefill(*, config: PrefillFlags = PrefillFlags(), process: ProcessFlags = ProcessFlags()) -> None:  # noqa: B008
    """Run one prefill worker: it reads prompts and builds their KV cache."""
    _work("prefill", config, process)


def decode(*, config: DecodeFlags = DecodeFlags(), process: ProcessFlags = ProcessFlags()) -> None:  # noqa: B008
    """Run one decode worker: it takes over KV caches and produces tokens."""
    _work("decode", config, process)


def _work(role: RoleName, config: WorkerConfig, process: ProcessFlags) -> None:
    process.prepare(role)
    from baton.launch.worker import run

    serve(lambda ready, stop: run(config, on_ready=ready, stop=stop), role, process.ready_fd)
