"""What the router knows of its workers' prefix caches, and how it stays true.

A worker tells its whole pool when it is asked to (a sync), and from then on what changes; its events are numbered
within the sync. Where a number is missing, what was known of that worker is dropped, and it is asked again.
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
    """The number of the update that a worker is to send next."""

    sync: int = 0
    sequence: int = 0


def digests_of(card: ModelCard, tokens: tuple[int, ...], tenant_salt: str) -> Digests:
    """Those of the complete blocks of `tokens`, made as far as they are asked for; the caller keeps them."""
    return Digests(tokens, card.kv_layout.block_tokens, tenant_salt, card.fingerprint)


class Prefixes:
    """The index, and the feeds that fill it. `limit` bounds its entries; with 0 nothing is asked for or known."""

    def __init__(self, limit: int, counts: Counts) -> None:
        self._index: PrefixIndex[Worker] | None = PrefixIndex(limit) if limit else None
        self._counts = counts
        self._expected: dict[Worker, NextUpdate] = {}

    def __len__(self) -> int:
        """Entries: blocks, each counted once for every worker that holds it."""
        return 0 if self._index is None else len(self._index)

    def expects(self, worker: Worker) -> NextUpdate:
        """Which event of a worker is the next."""
        return self._expected[worker]

    def held_by(self, worker: Worker) -> frozenset[bytes]:
        """The digests that a worker is known to hold. O(their number)."""
        return frozenset() if self._index is None else self._index.held_by(worker)

    def cached_tokens(self, card: ModelCard, known: int, digests: Digests) -> dict[Worker, int]:
        """Of `known` tokens with these digests, those that each worker need not compute, a multiple of the block;
        workers without any are left out. The last known token never counts: it is always computed.

        O(tokens of the longest cached prefix + workers): digests are made only as far as some worker holds them.
        """
        if self._index is None or not len(self._index):
            return {}
        block = card.kv_layout.block_tokens
        usable = usable_prefix(known, known // block, block) // block
        return {worker: run * block for worker, run in self._index.runs(islice(digests, usable)).items()}

    def on_joined(self, worker: Worker) -> None:
        """Asks for all that it holds."""
        if self._index is not None:
            self._expected[worker] = NextUpdate()
            self._ask(worker, self._expected[worker])

    def on_lost(self, worker: Worker) -> None:
        """Nothing is known of it any more. Idempotent."""
        self._expected.pop(worker, None)
        if self._index is not None:
            self._index.forget(worker)

    def on_update(self, worker: Worker, events: CacheUpdate) -> None:
        """What entered and left a worker's cache."""
        expected = self._expected.get(worker)
        if self._index is None or expected is None or events.sync != expected.sync:
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
