"""`baton chaos`: harm a local cluster under load, and say whether any stream noticed."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from baton.chaos.config import ChaosConfig
from baton.cli.exits import FAILURE, OK
from baton.cli.flags import as_flags


@as_flags()
@dataclass(frozen=True, kw_only=True)
class ChaosFlags(ChaosConfig):
    """A chaos run's settings."""


def chaos(*, config: ChaosFlags = ChaosFlags()) -> int:
    """Start a local cluster, kill and stop its workers under load, and check every stream against an undisturbed run.

    Prints a line per event as it happens, and a table. The same seed makes the same requests and events; what the
    cluster is doing when one comes is another matter each time.

    Exit status 0 only if every stream was identical, nothing is left over, and the harm was enough to show something.
    """
    from baton.chaos.run import chaos as harmed
    from baton.cli.commands.up import fetch

    if config.engine == "model":
        fetch(config.cluster().model)
    # Not on uvloop, which forks to start a process: gRPC, with calls under way, writes a line about each fork.
    judgement = asyncio.run(harmed(config, lambda line: print(line, flush=True)))
    return OK if judgement.good else FAILURE
