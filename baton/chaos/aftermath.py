"""What is left of a chaos run when its streams are over: it should be nothing.

`leftovers` is pure: it judges what the processes say of themselves, as docs/operations.md defines it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from baton.client import Client, ProcessStatus
from baton.errors import BatonError
from baton.launch.child import Child
from baton.launch.cluster import ROUTER, LocalCluster

QUIET_S = 20.0
"""How long processes may take to let go of everything."""
ASK_S, ASK_AGAIN_S = 5.0, 0.1
LIVE: Mapping[str, tuple[str, ...]] = {
    "router": ("requests", "attempts", "cancelling"),
    "prefill": ("attempts", "deliveries"),
    "decode": ("residents", "prompts_waiting", "handoffs_waiting", "grants", "aborting", "stalled"),
}
"""Live objects of which an idle process has none."""
ALARMS = frozenset(
    {
        "requests_poisonous", "cancels_unanswered", "long_texts_lost", "unknown_frames", "cache_gaps",
        "cache_events_refused", "duplicate_messages", "frames_unknown", "hellos_refused", "commands_failed",
        "results_failed", "sequences_failed", "late_steps", "writes_failed", "handshakes_refused", "writes_refused",
    }
)  # fmt: skip
"""Counters that stay at zero in a healthy cluster."""
EXPLAINED = frozenset({"requests_poisonous", "cancels_unanswered", "writes_failed"})
"""Those that dead and suspended workers explain: the rule for two deaths, a cancel to a worker that is gone, a block
write to one."""


@dataclass(frozen=True, slots=True)
class Aftermath:
    """What the processes said last, and what is `left`, a line each."""

    statuses: tuple[ProcessStatus, ...]
    left: tuple[str, ...]

    @property
    def failovers(self) -> int:
        """As the router counted them."""
        return sum(status.counters.get("failovers", 0) for status in self.statuses if not status.roles)


def leftovers(status: ProcessStatus) -> list[str]:
    """What a process that has nothing to do should not have, a line each."""
    found = []
    for role in status.roles or (ROUTER,):
        for name in LIVE[role]:
            if name not in status.live:
                found.append(f"{name}: not told")
            elif status.live[name]:
                found.append(f"{name}: {status.live[name]}")
    if status.roles:
        found += _pool_leftovers(status)
    found += [
        f"alarm {name}: {status.counters[name]}" for name in sorted(ALARMS - EXPLAINED) if status.counters.get(name)
    ]
    return [f"{status.name}: {line}" for line in found]


def _pool_leftovers(status: ProcessStatus) -> list[str]:
    pool = status.pool
    if pool is None:
        return ["pool: not told"]
    found = [f"{name} blocks: {getattr(pool, name)}" for name in ("held", "quarantined") if getattr(pool, name)]
    states = (pool.free, pool.held, pool.cached, pool.quarantined)
    if sum(states) != pool.blocks:
        found.append(f"pool: {' + '.join(map(str, states))} is not {pool.blocks}")
    if pool.integrity_error:
        found.append(f"pool: {pool.integrity_error}")
    return found


async def aftermath(cluster: LocalCluster, killed: Sequence[Child]) -> Aftermath:
    """Waits until nothing is left, for QUIET_S at most."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + QUIET_S
    while True:
        found = await _look(cluster, killed)
        if not found.left or loop.time() > deadline:
            return found
        await asyncio.sleep(ASK_AGAIN_S)


async def _look(cluster: LocalCluster, killed: Sequence[Child]) -> Aftermath:
    left: list[str] = []
    statuses: list[ProcessStatus] = []
    known: set[str] = set()
    for child in cluster.processes:
        if child in killed:
            if child.running:
                left.append(f"{child.name}: killed, and process {child.pid} is still there")
        elif not child.running:
            left.append(f"{child.name}: {child.describe_exit()}, and it was not us")
        else:
            try:
                async with Client(child.address) as client:
                    statuses.append(await client.status(timeout=ASK_S))
                    if child.role == ROUTER:
                        known = {worker.name for worker in await client.workers(timeout=ASK_S) if worker.attached}
            except BatonError as error:
                left.append(f"{child.name}: does not answer: {error}")
    left += [line for status in statuses for line in leftovers(status)]
    living = {child.name for child in cluster.processes if child.running and child.role != ROUTER}
    left += [f"router: has no stream to {name}" for name in sorted(living - known)]
    left += [f"router: still knows {name}" for name in sorted(known - living)]
    return Aftermath(tuple(statuses), tuple(left))
