"""Blocks for the residents as they write, and who has to go when the pool runs dry.

A resident gets its next block `AHEAD_TOKENS` before it needs it, between two steps. Where there is none it waits, and
the scheduler leaves it out once it can't go on. Whatever comes free goes to those that wait first, the oldest first,
and before anything new is let in: else newcomers could take it for ever.

Where nothing is about to come free, one sequence has to make room: of the lowest priority the one that was preempted
least often, of those the youngest. The oldest never has to, so that it ends, and then the next one is the oldest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

from baton.spec import AttemptKey
from baton.telemetry import Counts
from baton.worker.runner import Runner
from decode_worker.occupancy import Occupancy
from decode_worker.records import Resident, ResidentState
from decode_worker.scheduler import DecodeScheduler

AHEAD_TOKENS = 8
"""A step's tokens are known here when the next step has begun already, so it must be at least two."""


class Growth:
    """Lives on the event loop."""

    def __init__(
        self,
        occupancy: Occupancy,
        scheduler: DecodeScheduler,
        runner: Runner,
        preempt: Callable[[Resident], None],
        counts: Counts,
    ) -> None:
        """`preempt` takes a sequence out of the engine; its release leads to `feed`."""
        self._occupancy, self._scheduler, self._runner = occupancy, scheduler, runner
        self._preempt, self._counts = preempt, counts
        self._waiting: dict[AttemptKey, Resident] = {}
        self._stalls_counted = 0

    def __len__(self) -> int:
        """Residents that wait for a block."""
        return len(self._waiting)

    def advanced(self, resident: Resident) -> None:
        """The resident has a token more."""
        if resident.state is ResidentState.RUNNING and self._lacks(resident) > 0:
            self._waiting[resident.key.attempt] = resident

    def feed(self) -> bool:
        """Gives blocks to those that wait, and makes room for them. False while some still wait: nothing else may take
        what is free."""
        self._count_stalls()
        if not self._waiting:
            return True
        for resident in sorted(self._waiting.values(), key=lambda other: other.arrived_at):
            if not self._give(resident):
                break
            del self._waiting[resident.key.attempt]
        residents = self._occupancy.held.values()
        room_comes = any(other.state is ResidentState.STOPPING for other in residents)
        if self._waiting and not room_comes and (chosen := victim(residents)) is not None:
            self._preempt(chosen)
        return not self._waiting

    def _give(self, resident: Resident) -> bool:
        """False where the pool has too little for what the resident lacks."""
        if resident.state is not ResidentState.RUNNING or (lacks := self._lacks(resident)) <= 0:
            return True
        blocks = self._occupancy.ledger.grow(resident.key, lacks)
        if blocks is None:
            return False
        self._runner.between_steps(partial(self._scheduler.grow, resident.key.attempt, blocks))
        return True

    def _lacks(self, resident: Resident) -> int:
        """Blocks that it needs to go on, and soon will."""
        positions = min(len(resident.tokens) + AHEAD_TOKENS, resident.need.most)
        return self._occupancy.layout.blocks_for(positions) - len(self._occupancy.ledger.table(resident.key))

    def _count_stalls(self) -> None:
        stalls = self._scheduler.stalls
        if stalls > self._stalls_counted:
            self._counts.add("sequences_stalled", stalls - self._stalls_counted)
            self._stalls_counted = stalls


def victim(residents: Iterable[Resident]) -> Resident | None:
    """Who has to make room; None where nobody can. A router that tells no likely length could not place it again."""
    running = [resident for resident in residents if resident.state is ResidentState.RUNNING]
    oldest = min(running, key=lambda other: other.arrived_at, default=None)
    others = [resident for resident in running if resident is not oldest and resident.spec.likely_tokens]
    return min(others, key=lambda o: (o.spec.priority, o.spec.preemptions, -o.arrived_at), default=None)
