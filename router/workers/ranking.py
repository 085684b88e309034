"""Workers in the order of what they carry, so that placement finds those with the least without looking at all.

What changes on a worker is noted, and the worker is put in its new place when somebody asks next: a placement costs
as much as there were changes, not as there are workers.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Mapping, Sequence

from baton.config import RoleName
from router.workers.worker import Worker

Key = tuple[float, ...]
"""What is compared, and last the worker's number, which nobody else has."""


class Ranking:
    """Some workers of one role. The loop's own; a later ranking of the same workers and role takes this one's place."""

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
        """Up to `count` workers, those with the least first, of those that `may` be taken. What a worker need not
        compute or receive because it is `cached` there, in tokens, is taken off what it carries.

        O(count + workers in `cached` + workers that changed * log workers), and past all that may not be taken.
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
    """Of a prefill worker: the work before it; among those that are alike, the one chosen longest ago."""
    ledger, cost = worker.prefill, worker.cost
    less_s = saved * cost.per_token if saved and cost is not None else 0.0
    return ledger.work_s - less_s, ledger.queued_tokens - saved, worker.chosen_at


def _carried(worker: Worker, saved: int) -> Key:
    """Of a decode worker: the share of its pool that is taken; else the same."""
    return (worker.decode.tokens - saved) / worker.registration.blocks, worker.chosen_at
