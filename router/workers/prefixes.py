"""What the router knows of its workers' prefix caches, and how it stays true.

A worker tells its whole pool when it is asked to (a sync), and from then on what changes; its events are numbered
within the sync. Where a number is missing, what was known of that worker is dropped, and it is asked again.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice

import structlog

from baton.spec import SequenceSpec
from baton.telemetry import Counts
from baton.v1 import worker_pb2 as wire
from kvtransfer.blocks.prefix import DIGEST_BYTES, Digests, usable_prefix
from router.workers.prefix_index import PrefixIndex
from router.workers.worker import ModelCard, Worker

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class Expected:
    """A worker's next event."""

    sync: int = 0
    sequence: int = 0


def digests_of(card: ModelCard, spec: SequenceSpec) -> Digests:
    """Of what is known of a sequence; whoever looks it up more than once keeps them."""
    return Digests(spec.prompt + spec.output, card.kv_layout.block_tokens, spec.tenant_salt, card.fingerprint)


class Prefixes:
    """The index, and the feeds that fill it. `limit` bounds its entries; with 0 nothing is asked for or known."""

    def __init__(self, limit: int, counts: Counts) -> None:
        self._index: PrefixIndex[Worker] | None = PrefixIndex(limit) if limit else None
        self._counts = counts
        self._expected: dict[Worker, Expected] = {}

    def __len__(self) -> int:
        """Entries: blocks, each counted once for every worker that holds it."""
        return 0 if self._index is None else len(self._index)

    def expects(self, worker: Worker) -> Expected:
        """Which event of a worker is the next."""
        return self._expected[worker]

    def held_by(self, worker: Worker) -> frozenset[bytes]:
        """The digests that a worker is known to hold. O(their number)."""
        return frozenset() if self._index is None else self._index.held_by(worker)

    def cached_tokens(self, card: ModelCard, spec: SequenceSpec, digests: Digests | None = None) -> dict[Worker, int]:
        """Tokens of `spec` that each worker need not compute, a multiple of the block; workers without any are left
        out. The last known token never counts: it is always computed.

        O(tokens of the longest cached prefix + workers): digests are made only as far as some worker holds them, and
        not again where the sequence's own are given.
        """
        if self._index is None or not len(self._index):
            return {}
        known, block = spec.known_tokens, card.kv_layout.block_tokens
        usable = usable_prefix(known, known // block, block) // block
        digests = digests_of(card, spec) if digests is None else digests
        return {worker: run * block for worker, run in self._index.runs(islice(digests, usable)).items()}

    def on_joined(self, worker: Worker) -> None:
        """Asks for all that it holds."""
        if self._index is not None:
            self._expected[worker] = Expected()
            self._ask(worker, self._expected[worker])

    def on_lost(self, worker: Worker) -> None:
        """Nothing is known of it any more. Idempotent."""
        self._expected.pop(worker, None)
        if self._index is not None:
            self._index.forget(worker)

    def on_frame(self, worker: Worker, frame: wire.WorkerFrame) -> None:
        """`CacheEvents` of a worker."""
        events, expected = frame.cache_events, self._expected.get(worker)
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

    def _ask(self, worker: Worker, expected: Expected) -> None:
        expected.sync, expected.sequence = expected.sync + 1, 1
        self._counts.add("cache_syncs")
        worker.link.send(wire.RouterFrame(cache_sync=wire.CacheSyncCommand(sync=expected.sync)))
