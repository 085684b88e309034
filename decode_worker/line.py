"""Handoffs that wait for room on this worker: one queue, by priority and then by the age of the request.

The first one keeps what comes free until there is enough for it: else small sequences would pass a large one for ever.
Prompts that are computed here stand in the same order (`Residents.start_waiting`).
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from baton.spec import AttemptKey, HandoffKey, SequenceSpec
from baton.worker.session import RouterSession
from kvtransfer.blocks.admission import Need
from kvtransfer.handoffs.messages import Grant, Refusal

Order = tuple[int, float]


def order_of(spec: SequenceSpec, arrived_at: float) -> Order:
    return -spec.priority, arrived_at


@dataclass(slots=True, eq=False)
class Parked:
    """An Open without an answer yet. `writer` is the sender's incarnation; `arrived_at`, of the request at its router,
    and `deadline_at` are monotonic seconds. `told`: the writer knows that it waits."""

    key: HandoffKey
    writer: str
    spec: SequenceSpec
    need: Need
    digests: list[bytes]
    router: RouterSession
    transport: str
    arrived_at: float
    deadline_at: float | None
    answer: Grant | Refusal | None = None
    told: bool = False

    @property
    def order(self) -> Order:
        return order_of(self.spec, self.arrived_at)


class RoomLine:
    """At most one handoff of an attempt. O(log n) to find a place, and a move of the list to take it."""

    def __init__(self) -> None:
        self._places: list[tuple[Order, int]] = []
        self._parked: dict[tuple[Order, int], Parked] = {}
        self._by_attempt: dict[AttemptKey, tuple[Order, int]] = {}
        self._numbers = itertools.count()
        self.admit: Callable[[Parked], bool] = lambda parked: False
        """Gives the first one its room; False where there is none yet. Set by whoever grants."""

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[Parked]:
        return iter(list(self._parked.values()))

    @property
    def first(self) -> Parked | None:
        return self._parked[self._places[0]] if self._places else None

    def find(self, attempt: AttemptKey) -> Parked | None:
        place = self._by_attempt.get(attempt)
        return None if place is None else self._parked[place]

    def add(self, parked: Parked) -> None:
        assert parked.key.attempt not in self._by_attempt, "an attempt waits once"
        place = parked.order, next(self._numbers)
        bisect.insort(self._places, place)
        self._parked[place] = parked
        self._by_attempt[parked.key.attempt] = place

    def remove(self, attempt: AttemptKey) -> Parked | None:
        """None when it does not wait."""
        place = self._by_attempt.pop(attempt, None)
        if place is None:
            return None
        del self._places[bisect.bisect_left(self._places, place)]
        return self._parked.pop(place)

    def ahead_of(self, parked: Parked) -> int:
        return bisect.bisect_left(self._places, self._by_attempt[parked.key.attempt])
