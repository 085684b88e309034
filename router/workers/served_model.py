"""A model while workers serve it, and its workers in the order of their load.

A worker that changes is noted and put in its new place at the next look: a placement costs as much as there were
changes, not as there are workers.
"""

from __future__ import annotations

import asyncio
import bisect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field

from baton.config import RoleName
from baton.errors import Mismatch
from baton.identity import fingerprint_difference
from baton.model import ModelCard
from router.placement.lengths import OutputLengths
from router.text.tokenisation import Language
from router.workers.worker import Worker

Key = tuple[float, ...]
"""The load of a worker, and last its own number."""


class Ranking:
    """Workers of one role; for the event loop only. A later ranking of the same workers and role replaces this."""

    def __init__(self, workers: Sequence[Worker], role: RoleName) -> None:
        self._workers = workers
        self._key = _awaited if role == "prefill" else _carried
        self._numbers = {worker: number for number, worker in enumerate(workers)}
        self._keys: list[Key] = [(*self._key(worker, 0), number) for number, worker in enumerate(workers)]
        self._order = sorted(self._keys)
        self._changed: set[Worker] = set()
        for worker in workers:
            worker.watchers[role] = self._changed.add

    def __len__(self) -> int:
        return len(self._workers)

    def least(
        self, count: int, cached: Mapping[Worker, int], may: Callable[[Worker], bool] | None = None
    ) -> list[Worker]:
        """The `count` least-loaded workers for which `may` is true, the least first. Tokens that are `cached` on a
        worker are taken off its load.

        O(count + workers in `cached` + workers that changed * log workers), and those passed over.
        """
        self._refresh()
        workers = self._workers
        saving: list[Key] = []
        for worker, saved in cached.items():
            number = self._numbers.get(worker)
            if number is not None and (may is None or may(worker)):
                saving.append((*self._key(worker, saved), number))
        others: list[Key] = []
        for key in self._order:
            if len(others) == count:
                break
            worker = workers[int(key[-1])]
            if (not saving or worker not in cached) and (may is None or may(worker)):
                others.append(key)
        found = sorted(others + saving)[:count] if saving else others
        return [workers[int(key[-1])] for key in found]

    def _refresh(self) -> None:
        order, keys = self._order, self._keys
        for worker in self._changed:
            number = self._numbers[worker]
            key = (*self._key(worker, 0), number)
            if key != keys[number]:
                del order[bisect.bisect_left(order, keys[number])]
                bisect.insort(order, key)
                keys[number] = key
        self._changed.clear()


def _awaited(worker: Worker, saved: int) -> Key:
    """Of a prefill worker: its queue; among equals, the one chosen longest ago is first."""
    ledger, cost = worker.prefill, worker.cost
    less_s = saved * cost.per_token if saved and cost is not None else 0.0
    return ledger.work_s - less_s, ledger.queued_tokens - saved, worker.chosen_at


def _carried(worker: Worker, saved: int) -> Key:
    """Of a decode worker: the occupied share of its pool; among equals, the one chosen longest ago is first."""
    return (worker.decode.tokens - saved) / worker.registration.blocks, worker.chosen_at


@dataclass(eq=False, slots=True)
class ServedModel:
    """`language` is None until a worker has delivered it."""

    card: ModelCard
    language: Language | None = None
    workers: list[Worker] = field(default_factory=list)
    """By name."""
    loading: asyncio.Lock = field(default_factory=asyncio.Lock)
    lengths: OutputLengths = field(default_factory=OutputLengths)
    _usable: dict[RoleName, list[Worker]] = field(default_factory=dict)
    _rankings: dict[RoleName, Ranking] = field(default_factory=dict)

    def usable(self, role: RoleName) -> list[Worker]:
        """Workers of that role that take new work, by name. The list is shared: callers must not change it."""
        found = self._usable.get(role)
        if found is None:
            found = [worker for worker in self.workers if worker.usable and role in worker.registration.roles]
            self._usable[role] = found
        return found

    def there(self, role: RoleName) -> list[Worker]:
        """The usable workers; without any, those that are away. As for `usable`, callers
        must not change the list."""
        return self.usable(role) or [w for w in self.workers if w.away and role in w.registration.roles]

    def changed(self) -> None:
        """Forgets what depends on which workers are usable."""
        self._usable.clear()
        self._rankings.clear()

    def ranking(self, role: RoleName) -> Ranking:
        """Of those that are `there`."""
        found = self._rankings.get(role)
        if found is None:
            found = self._rankings[role] = Ranking(self.there(role), role)
        return found


def check_card(ours: ModelCard, theirs: ModelCard) -> None:
    """Raises Mismatch with the first field in which two workers of one model differ, and both values."""
    found = _differences(asdict(ours), asdict(theirs))
    # The fingerprint covers the other fields, so that any of them is the better explanation.
    for name, mine, other in sorted(found, key=lambda difference: difference[0] == "fingerprint"):
        if name == "fingerprint":
            name, mine, other = fingerprint_difference(mine, other)
        text = f"model.{name}: {other} differs from {mine}, which the workers here that serve {ours.name} have"
        raise Mismatch(f"model.{name}", mine, other, text)


def _differences(
    ours: dict[str, object], theirs: dict[str, object], prefix: str = ""
) -> Iterable[tuple[str, str, str]]:
    for name, mine in ours.items():
        other = theirs[name]
        if isinstance(mine, dict) and isinstance(other, dict):
            yield from _differences(mine, other, f"{prefix}{name}.")
        elif mine != other:
            yield f"{prefix}{name}", _show(mine), _show(other)


def _show(value: object) -> str:
    return str(list(value)) if isinstance(value, tuple) else str(value)
