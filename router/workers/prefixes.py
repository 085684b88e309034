"""The router's knowledge of its workers' prefix caches, and how it stays true.

On request a worker reports its whole pool (a sync), and from then on each change; its events are numbered within the
sync. Where a number is missing, the entries of that worker are dropped and a new sync is requested.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice

import structlog

from baton.messages import CacheSyncCommand, CacheUpdate
from baton.model import ModelCard
from baton.telemetry import Counts
from kvtransfer.blocks.prefix import DIGEST_BYTES, Digests, usable_prefix
from router.workers.prefix_index import PrefixIndex
from router.workers.worker import Worker

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class NextUpdate:
    """The numbers of a worker's next update."""

    sync: int = 0
    sequence: int = 0


def digests_of(card: ModelCard, tokens: tuple[int, ...], tenant_salt: str) -> Digests:
    """Of the complete blocks of `tokens`, made lazily; the caller keeps them."""
    return Digests(tokens, card.kv_layout.block_tokens, tenant_salt, card.fingerprint)


class Prefixes:
    """The index, and the updates that fill it. `limit` bounds its entries; 0 turns it off."""

    def __init__(self, limit: int, counts: Counts) -> None:
        self._enabled = limit > 0
        self._index: PrefixIndex[Worker] = PrefixIndex(max(limit, 1))
        self._counts = counts
        self._expected: dict[Worker, NextUpdate] = {}

    def __len__(self) -> int:
        """Entries: blocks, each counted once for every worker that holds it."""
        return len(self._index)

    def expects(self, worker: Worker) -> NextUpdate:
        return self._expected[worker]

    def held_by(self, worker: Worker) -> frozenset[bytes]:
        """As `PrefixIndex.held_by`. O(entries of the worker)."""
        return self._index.held_by(worker)

    def cached_tokens(self, card: ModelCard, known: int, digests: Digests) -> dict[Worker, int]:
        """How many of `known` tokens with these digests each worker need not compute, a multiple of the block; workers
        without any are left out. The last known token never counts: it is always computed.

        O(tokens of the longest cached prefix + workers): digests are made only as far as a worker holds them.
        """
        if not len(self._index):
            return {}
        block = card.kv_layout.block_tokens
        usable = usable_prefix(known, known // block, block) // block
        return {worker: run * block for worker, run in self._index.runs(islice(digests, usable)).items()}

    def on_joined(self, worker: Worker) -> None:
        """Requests a sync."""
        if self._enabled:
            self._expected[worker] = NextUpdate()
            self._ask(worker, self._expected[worker])

    def on_lost(self, worker: Worker) -> None:
        """Drops all entries of the worker. Idempotent."""
        self._expected.pop(worker, None)
        self._index.forget(worker)

    def on_update(self, worker: Worker, events: CacheUpdate) -> None:
        expected = self._expected.get(worker)
        if expected is None or events.sync != expected.sync:
            return  # void: sent before the worker heard of this sync
        if events.sequence != expected.sequence:
            self._counts.add("cache_gaps")
            log.warning("cache events missing", worker=worker.name, came=events.sequence, expected=expected.sequence)
            self._index.forget(worker)
            self._ask(worker, expected)
            return
        expected.sequence += 1
        if any(len(digest) != DIGEST_BYTES for digest in (*events.inserted, *events.evicted)):
            self._counts.add("cache_events_refused")
            log.warning("cache_events: a digest does not have its length; no more are taken", worker=worker.name)
            self.on_lost(worker)
            return
        self._index.evict(worker, events.evicted)
        if dropped := self._index.insert(worker, events.inserted):
            self._counts.add("prefix_blocks_dropped", dropped)

    def _ask(self, worker: Worker, expected: NextUpdate) -> None:
        expected.sync, expected.sequence = expected.sync + 1, 1
        self._counts.add("cache_syncs")
        worker.link.send(CacheSyncCommand(expected.sync))
