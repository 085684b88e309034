"""The kinds of harm, and how the events of a plan are done one after another.

A kind is a function in `KINDS`. It does its event and says what it hit; None means that the cluster can't bear the
event now, and that it is to be asked again. One worker of each role is always left in peace: a cluster without any may
refuse requests, and would be right to.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from baton.chaos.load import ChaosLoad
from baton.chaos.plan import ChaosPlan, Strike
from baton.client import Client
from baton.config import RoleName
from baton.errors import Unavailable
from baton.launch.child import Child
from baton.launch.cluster import ROUTER, LocalCluster
from baton.rpc.net import cancelling

STOP_S, STOP_MORE_S = 2.0, 2.0
"""A stopped worker stands still for the first, and up to the second longer. After 1.5 s its streams leave it."""
BEARABLE_S = 30.0
"""How long an event waits until the cluster can bear it."""
LOOK_AGAIN_S = 0.05


@dataclass(frozen=True, slots=True)
class Happening:
    """An event as it happened, in seconds of the run's clock. `streams` are those that the router had on the worker."""

    at_s: float
    until_s: float
    kind: str
    target: str
    """A worker's name, or a stream's label."""
    streams: int = 0
    note: str = ""


class Harm:
    """Does a plan's events to a cluster. `happened` are those so far, `killed` the processes that are no more."""

    def __init__(
        self,
        cluster: LocalCluster,
        client: Client,
        load: ChaosLoad,
        clock: Callable[[], float],
        tell: Callable[[Happening], None],
    ) -> None:
        self.cluster, self.load, self.clock = cluster, load, clock
        self.happened: list[Happening] = []
        self.killed: list[Child] = []
        self._client, self._tell = client, tell
        self._born: Counter[str] = Counter(child.role for child in cluster.processes)
        self._resting: set[str] = set()
        """Names of workers that are stopped."""
        self._pending: set[asyncio.Task[None]] = set()

    async def run(self, plan: ChaosPlan) -> None:
        """Lasts until every event is over, and every killed worker replaced. Raises Unavailable where a fresh worker
        does not start, and where an event could not be done within BEARABLE_S of its time."""
        began = self.clock()
        try:
            for strike in plan.strikes:
                await asyncio.sleep(max(began + strike.at_s - self.clock(), 0.0))
                await self._do(strike)
            for task in list(self._pending):
                await task
        finally:
            async with cancelling(*self._pending):
                pass

    def victim(self, strike: Strike) -> Child | None:
        """A worker of the planned role that is up, or of the other role where the last one of that would be hit."""
        others: RoleName = "prefill" if strike.role == "decode" else "decode"
        for role in (strike.role, others):
            found = [child for child in self._up() if child.role == role]
            if len(found) > 1:
                return found[int(strike.pick * len(found))]
        return None

    async def streams_on(self, worker: Child) -> int:
        """How many the router has there."""
        return sum(found.attempts for found in await self._client.workers() if found.name == worker.name)

    def kill(self, worker: Child) -> None:
        """Ends it at once, and starts a fresh one in the background."""
        worker.kill()
        self.killed.append(worker)
        name, role = f"{worker.role}-{self._born[worker.role]}", _role_of(worker)
        self._born[worker.role] += 1
        self._in_background(self._replace(name, role))

    def stop(self, worker: Child, seconds: float) -> None:
        """Suspends it for so long, in the background."""
        os.kill(worker.pid, signal.SIGSTOP)
        self._resting.add(worker.name)
        self._in_background(self._go_on(worker, seconds))

    def _up(self) -> list[Child]:
        """Workers that run and have said that they are ready."""
        children = [child for child in self.cluster.processes if child.role != ROUTER and child.address]
        gone = {child.name for child in self.killed} | self._resting
        return [child for child in children if child.running and child.name not in gone]

    async def _do(self, strike: Strike) -> None:
        try:
            async with asyncio.timeout(BEARABLE_S):
                while True:
                    self._raise_failures()
                    happening = await KINDS[strike.kind](self, strike)
                    if happening is not None:
                        break
                    await asyncio.sleep(LOOK_AGAIN_S)
        except TimeoutError:
            raise Unavailable(
                f"the cluster was in no state for the event {strike.kind} within {BEARABLE_S:g} s"
            ) from None
        self.happened.append(happening)
        self._tell(happening)

    async def _replace(self, name: str, role: RoleName) -> None:
        await self.cluster.add(name, role)

    async def _go_on(self, worker: Child, seconds: float) -> None:
        try:
            await asyncio.sleep(seconds)
        finally:
            os.kill(worker.pid, signal.SIGCONT)
            self._resting.discard(worker.name)

    def _in_background(self, doing: Awaitable[None]) -> None:
        self._pending.add(asyncio.ensure_future(doing))

    def _raise_failures(self) -> None:
        for task in [task for task in self._pending if task.done()]:
            self._pending.discard(task)
            task.result()


def _role_of(worker: Child) -> RoleName:
    return "prefill" if worker.role == "prefill" else "decode"


async def _kill(harm: Harm, strike: Strike) -> Happening | None:
    """SIGKILL; a fresh worker comes in its place, under another name."""
    worker = harm.victim(strike)
    if worker is None:
        return None
    streams = await harm.streams_on(worker)
    at_s = harm.clock()
    harm.kill(worker)
    return Happening(at_s, at_s, strike.kind, worker.name, streams)


async def _stop(harm: Harm, strike: Strike) -> Happening | None:
    """SIGSTOP for 2 to 4 s, then SIGCONT."""
    worker = harm.victim(strike)
    if worker is None:
        return None
    seconds = STOP_S + strike.size * STOP_MORE_S
    streams = await harm.streams_on(worker)
    at_s = harm.clock()
    harm.stop(worker, seconds)
    return Happening(at_s, at_s + seconds, strike.kind, worker.name, streams, f"for {seconds:.1f} s")


async def _cancel(harm: Harm, strike: Strike) -> Happening | None:
    """A client leaves its stream, at whatever token that is by now, or before the first."""
    courses = harm.load.candidates()
    if not courses:
        return None
    course = courses[int(strike.pick * len(courses))]
    at_s, tokens = harm.clock(), len(course.heard.ids)
    if not harm.load.leave(course):
        return None
    return Happening(at_s, at_s, strike.kind, course.label, 1, f"after {tokens} tokens")


Kind = Callable[[Harm, Strike], Awaitable[Happening | None]]
KINDS: dict[str, Kind] = {"kill": _kill, "stop": _stop, "cancel": _cancel}
"""By the name that the plan and the report use."""
