"""Which workers hold which blocks, by digest, within a bound.

A digest's workers are the bits of one integer, so that one walk along a prompt's digests answers for all workers. A
full index drops the least recently used entries, a chain's end before its start.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import Generic, TypeVar

W = TypeVar("W", bound=Hashable)


class PrefixIndex(Generic[W]):
    """At most `limit` entries, an entry being one digest of one worker. Pure."""

    def __init__(self, limit: int) -> None:
        assert limit >= 1, "room for one entry"
        self._limit = limit
        self._entries = 0
        self._holders: OrderedDict[bytes, int] = OrderedDict()  # least recently used first
        self._slots: dict[W, int] = {}
        self._free_slots: list[int] = []
        self._workers: list[W | None] = []
        self._digests: list[set[bytes]] = []

    def __len__(self) -> int:
        return self._entries

    def held_by(self, worker: W) -> frozenset[bytes]:
        """The digests of a worker; a copy, for tests and tools."""
        slot = self._slots.get(worker)
        return frozenset() if slot is None else frozenset(self._digests[slot])

    def insert(self, worker: W, digests: Sequence[bytes]) -> int:
        """The worker holds these, in the order of their chain; returns the number of entries that were dropped."""
        slot = self._slot(worker)
        bit, held, holders = 1 << slot, self._digests[slot], self._holders
        for digest in reversed(digests):
            if digest not in held:
                held.add(digest)
                holders[digest] = holders.get(digest, 0) | bit
                holders.move_to_end(digest)
                self._entries += 1
        return self._shrink()

    def evict(self, worker: W, digests: Iterable[bytes]) -> None:
        """The worker no longer holds these; unknown digests are skipped."""
        slot = self._slots.get(worker)
        if slot is not None:
            self._remove(slot, [digest for digest in digests if digest in self._digests[slot]])

    def forget(self, worker: W) -> None:
        """Drops all entries of the worker. O(its entries). Idempotent."""
        slot = self._slots.pop(worker, None)
        if slot is not None:
            self._remove(slot, list(self._digests[slot]))
            self._workers[slot] = None
            self._free_slots.append(slot)

    def runs(self, digests: Iterable[bytes]) -> dict[W, int]:
        """How many leading `digests` each worker holds; workers without any are left out.

        Consumes one digest more than the longest run, which it marks as used. O(longest run + workers).
        """
        holders, running = self._holders, -1
        found: dict[W, int] = {}
        used: list[bytes] = []
        for digest in digests:
            still = holders.get(digest, 0) & running
            if still != running:
                self._note(found, running & ~still if used else 0, len(used))
                running = still
                if not still:
                    break
            used.append(digest)
        self._note(found, running if used else 0, len(used))
        for digest in reversed(used):
            holders.move_to_end(digest)
        return found

    def _note(self, found: dict[W, int], bits: int, run: int) -> None:
        for slot in _slots_of(bits):
            worker = self._workers[slot]
            assert worker is not None, "a bit of a worker that is known"
            found[worker] = run

    def _slot(self, worker: W) -> int:
        slot = self._slots.get(worker)
        if slot is None:
            if not self._free_slots:
                self._free_slots.append(len(self._workers))
                self._workers.append(None)
                self._digests.append(set())
            slot = self._slots[worker] = self._free_slots.pop()
            self._workers[slot] = worker
        return slot

    def _remove(self, slot: int, digests: list[bytes]) -> None:
        others, holders = ~(1 << slot), self._holders
        for digest in digests:
            left = holders[digest] & others
            if left:
                holders[digest] = left
            else:
                del holders[digest]
        self._digests[slot].difference_update(digests)
        self._entries -= len(digests)

    def _shrink(self) -> int:
        dropped = 0
        while self._entries - dropped > self._limit:
            digest, bits = self._holders.popitem(last=False)
            for slot in _slots_of(bits):
                self._digests[slot].remove(digest)
                dropped += 1
        self._entries -= dropped
        return dropped


def _slots_of(bits: int) -> Iterator[int]:
    """The numbers of the bits that are set."""
    while bits:
        low = bits & -bits
        yield low.bit_length() - 1
        bits ^= low
