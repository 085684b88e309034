"""A role's process: how it starts, says that it is ready, and stops on a signal."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable

import uvloop

from baton.errors import ConfigError

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
Role = Callable[[Callable[[str], None], asyncio.Event], Awaitable[None]]
"""Serves until the event is set; calls back with its address once it is ready."""


def serve(role: Role, name: str, ready_fd: int | None) -> None:
    """Runs a role on uvloop until it ends or a signal stops it. Call it in the main thread."""

    async def main() -> None:
        stop = asyncio.Event()
        stop_on_signals(stop.set)
        await role(lambda address: announce(address, name, ready_fd), stop)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


def stop_on_signals(stop: Callable[[], object]) -> None:
    """The first SIGTERM, SIGINT or SIGHUP calls `stop` in the running loop; a second one ends the process at once."""
    loop = asyncio.get_running_loop()
    signals: list[int] = []

    def on_signal(number: int) -> None:
        if signals:
            os._exit(128 + number)
        signals.append(number)
        stop()

    for number in STOP_SIGNALS:
        loop.add_signal_handler(number, on_signal, number)


def announce(address: str, role: str, ready_fd: int | None) -> None:
    """Writes the address and a newline to the descriptor and closes it; without one, a line to stdout."""
    if ready_fd is None:
        print(f"baton {role} ready: {address}", flush=True)
        return
    try:
        with os.fdopen(ready_fd, "w") as pipe:
            pipe.write(f"{address}\n")
    except OSError as error:
        raise ConfigError(f"ready-fd: cannot write to {ready_fd}: {(error.strerror or str(error)).lower()}") from None


def leave_terminal() -> None:
    """Leaves the parent's process group: a terminal's Ctrl-C then reaches the parent alone, which stops this process.

    Not for a session of its own: Linux shares the cores among sessions before threads (autogroup in sched(7)), and with
    more sessions than cores one of them is at times left without any for seconds.
    """
    if os.getpgrp() != os.getpid():
        os.setpgid(0, 0)
