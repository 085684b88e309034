"""Tells routers which prefixes the pool holds: first all, then each change.

A router asks by `CacheSyncCommand`, and again when it finds a number missing. Changes are gathered for `INTERVAL_S`;
an insertion and an eviction of the same digest cancel out. So what waits for a router is at most the difference between
its knowledge and the pool, however long it takes no frames.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterable

from baton.messages import CacheSyncCommand, CacheUpdate, Command
from baton.telemetry import Counts
from baton.worker.session import RouterSession
from kvtransfer.blocks.pool import BlockPool, CacheChange

INTERVAL_S = 0.05
PIECE_DIGESTS = 1024
"""In one message: 18 KiB, so that a cancel behind it does not wait long."""
PIECE_S = 0.005
"""Between two messages of one sync: other frames come in between."""
BACKLOG_FRAMES = 256
"""A router with so many frames unread gets its changes later, and fewer of them."""


class CacheFeed:
    """One sync of one router: the changes that it has yet to be told. Pure."""

    def __init__(self, sync: int, digests: Iterable[bytes]) -> None:
        self._sync, self._sequence = sync, 0
        self._pending = dict.fromkeys(digests, CacheChange.INSERTED)

    @property
    def due(self) -> bool:
        """Whether a message is due; the first one always is, even if the pool is empty."""
        return bool(self._pending) or self._sequence == 0

    def changed(self, change: CacheChange, digest: bytes) -> None:
        """Notes a change. A digest comes and goes in turn, so a second change undoes the first."""
        if self._pending.pop(digest, None) is None:
            self._pending[digest] = change

    def take(self) -> CacheUpdate:
        self._sequence += 1
        inserted: list[bytes] = []
        evicted: list[bytes] = []
        for digest in list(itertools.islice(self._pending, PIECE_DIGESTS)):
            (inserted if self._pending.pop(digest) is CacheChange.INSERTED else evicted).append(digest)
        return CacheUpdate(self._sync, self._sequence, inserted, evicted)


class CacheEvents:
    """Feeds every router that asks. A `RoleHandler`, on the pool's event loop."""

    def __init__(self, pool: BlockPool, counts: Counts) -> None:
        self._pool, self._counts = pool, counts
        self._feeds: dict[RouterSession, CacheFeed] = {}
        self._timer: asyncio.TimerHandle | None = None
        pool.listeners.append(self._changed)

    def on_command(self, router: RouterSession, command: Command) -> None:
        if isinstance(command, CacheSyncCommand):
            self._counts.add("cache_snapshots")
            self._feeds[router] = CacheFeed(command.sync, self._pool.digests())
            self._arm(PIECE_S)

    def on_router_lost(self, router: RouterSession) -> None:
        self._feeds.pop(router, None)
        if not self._feeds and self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _changed(self, change: CacheChange, digest: bytes) -> None:
        for feed in self._feeds.values():
            feed.changed(change, digest)
        if self._feeds:
            self._arm(INTERVAL_S)

    def _arm(self, seconds: float) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(seconds, self._flush)

    def _flush(self) -> None:
        """Sends one message to each router for which one is due; the rest comes after a pause."""
        self._timer = None
        for router, feed in self._feeds.items():
            if feed.due and router.link.pending < BACKLOG_FRAMES:
                router.send(feed.take())
        late = [router.link.pending >= BACKLOG_FRAMES for router, feed in self._feeds.items() if feed.due]
        if late:
            self._arm(INTERVAL_S if all(late) else PIECE_S)
