"""One worker in a process of its own: the real role, streams and transport, over the counting engine.

A test strikes at a step of the handoff where the process has stopped itself (`stopping`), by a signal or on the other
side, so no test sleeps and hopes.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

from tests.faults.namespaces import enter, own_pids
from tests.faults.stopping import Plan, Stop, WatchedDecode, WatchedPrefill
from tests.roles.node import DecodeNode, PrefillNode


@dataclass(frozen=True, slots=True)
class Report:
    """What a worker holds, has counted and thinks of its books."""

    busy: dict[str, int]
    counts: dict[str, int]
    live: dict[str, int]
    quarantined: int
    available: int
    aborts: list[str]
    fault: str


def report(node: PrefillNode | DecodeNode) -> Report:
    fault = ""
    try:
        node.check()
    except AssertionError as error:
        fault = repr(error)
    pool = node.pool.statistics()
    return Report(
        node.busy(),
        node.counts.snapshot(),
        node.role.live,
        pool.quarantined,
        node.pool.available,
        node.aborts if isinstance(node, WatchedDecode) else [],
        fault,
    )


def contents(node: PrefillNode | DecodeNode) -> list[str]:
    """What each block of its pool holds."""
    return [hashlib.sha256(node.memory.block(i)).hexdigest() for i in range(node.memory.blocks)]


def tear() -> int:
    """Breaks all connections of the shm transport (sequenced packets over unix sockets); how many there were."""
    found = 0
    for entry in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            fd = os.dup(int(entry))
            with socket.socket(fileno=fd) as wire:
                if (wire.family, wire.type) == (socket.AF_UNIX, socket.SOCK_SEQPACKET):
                    wire.shutdown(socket.SHUT_RDWR)
                    found += 1
    return found


def main(control: Connection, steps: Connection, plan: Plan) -> None:
    """The process, until the test ends its pipe."""
    if plan.namespace is not None:
        enter(plan.namespace)
    if plan.own_pids:
        own_pids()
    asyncio.run(_serve(control, Stop(plan.stop_at, steps), plan))


async def _serve(control: Connection, stop: Stop, plan: Plan) -> None:
    node = WatchedPrefill(plan, stop) if plan.role == "prefill" else WatchedDecode(plan, stop)
    await node.start()
    over = asyncio.Event()
    verbs: dict[str, Callable[..., Any]] = {
        "report": lambda: report(node),
        "contents": lambda: contents(node),
        "tear": tear,
        "gate": lambda opened: node.engine.gate.set() if opened else node.engine.gate.clear(),
    }
    if isinstance(node, WatchedDecode):
        verbs["endpoint"] = node.watched.inner.endpoint
        verbs["advertise"] = partial(setattr, node.watched, "endpoint_")

    def command() -> None:
        try:
            verb, arguments = control.recv()
        except (EOFError, OSError):
            over.set()
            return
        control.send(verbs[verb](*arguments))

    loop = asyncio.get_running_loop()
    loop.add_reader(control.fileno(), command)
    control.send(node.process)
    await over.wait()
    loop.remove_reader(control.fileno())
    await node.stop()
