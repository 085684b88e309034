"""The blocks of one KV pool, with an index of cached prefixes.

    FREE ──allocate──> HELD(count) ──release, no digest──> FREE
                         │  ^   └────release, digest──────> CACHED ──evicted by allocate──> HELD
                         │  └──────────────match, hold────────┘
                         └─quarantine─> QUARANTINED ─unquarantine─> FREE

Every block is in exactly one of the four states. A holder releases exactly the holds that it took. The writer of a
complete block may `insert` its digest: that makes it findable while held and keeps it CACHED after the last release.

Cached blocks are evicted least recently used first, blocks that `match` never found before those that it did (segmented
LRU, Karedla et al. 1994): a burst of unshared prompts does not evict a shared prefix. At most half of the pool is
protected in this way.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum


class CacheChange(Enum):
    INSERTED = "inserted"
    EVICTED = "evicted"


CacheListener = Callable[[CacheChange, bytes], None]
"""Called at once, on the pool's thread, with each digest that enters or leaves the prefix index."""


class PoolCorrupt(AssertionError):
    """The pool's books contradict each other: a bug."""


@dataclass(frozen=True, slots=True)
class PoolStatistics:
    """A snapshot, in blocks. `free + held + cached + quarantined == total`."""

    total: int
    free: int
    held: int
    cached: int
    quarantined: int
    evictions: int


class BlockPool:
    """Hands out the block numbers [0, blocks). Not thread-safe: one asyncio loop owns it. O(1) per block."""

    def __init__(self, blocks: int) -> None:
        if blocks < 1:
            raise ValueError(f"blocks must be at least 1, not {blocks}")
        self.blocks = blocks
        self.listeners: list[CacheListener] = []
        self._free = list(range(blocks - 1, -1, -1))
        self._holds = [0] * blocks
        self._held = 0
        self._digest: list[bytes | None] = [None] * blocks
        self._index: dict[bytes, int] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._protected: OrderedDict[int, None] = OrderedDict()  # cached too, and found by `match`; same order
        self._found = [False] * blocks
        self._quarantined: set[int] = set()
        self._evictions = 0

    @property
    def available(self) -> int:
        """Blocks that `allocate` could give now: free and cached ones."""
        return len(self._free) + len(self._cached) + len(self._protected)

    def allocate(self, count: int) -> list[int] | None:
        """`count` blocks of undefined content, each with one hold, free ones first, then cached ones, which it evicts;
        None, and no change, without room."""
        assert count >= 0, "a negative number of blocks"
        if count > self.available:
            return None
        return [self._take() for _ in range(count)]

    def hold(self, blocks: Iterable[int]) -> None:
        """Adds a hold to each block; all must be HELD or CACHED."""
        for block in blocks:
            if self._holds[block] == 0:
                cached = self._protected if block in self._protected else self._cached
                assert block in cached, f"block {block} is neither held nor cached"
                del cached[block]
                self._held += 1
            self._holds[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Drops one hold of each block. Without holds a block is CACHED if it has a digest, else FREE.

        `blocks` are in the order of their sequence: later ones are evicted first, since `match` finds a block of a
        chain only through those before it.
        """
        for block in reversed(blocks):
            if not self._drop_hold(block):
                continue
            if self._digest[block] is None:
                self._free.append(block)
            elif self._found[block]:
                self._protect(block)
            else:
                self._cached[block] = None

    def match(self, digests: Iterable[bytes]) -> list[int]:
        """The blocks of the longest leading run of `digests` that the pool has, with one more hold each."""
        found: list[int] = []
        for digest in digests:
            block = self._index.get(digest)
            if block is None:
                break
            self.hold((block,))
            self._found[block] = True
            found.append(block)
        return found

    def peek(self, digests: Iterable[bytes]) -> int:
        """The number of blocks that `match` would find; takes no holds."""
        count = 0
        for digest in digests:
            if digest not in self._index:
                break
            count += 1
        return count

    def cost(self, digests: Iterable[bytes], blocks: int) -> int:
        """How much less would be `available` once a sequence of `blocks` blocks had those that `match` finds and fresh
        ones. Found ones that others hold cost nothing."""
        for digest in digests:
            block = self._index.get(digest)
            if block is None:
                break
            blocks -= self._holds[block] > 0
        return blocks

    def digests(self) -> list[bytes]:
        """All digests in the index. O(pool)."""
        return list(self._index)

    def insert(self, block: int, digest: bytes) -> bool:
        """Makes a complete, held block findable. False, and no change, if the digest or the block is in the index: then
        the first block keeps the digest, and this one is FREE after its last hold."""
        assert self._holds[block] > 0, f"block {block} is not held"
        if digest in self._index or self._digest[block] is not None:
            return False
        self._digest[block] = digest
        self._index[digest] = block
        self._tell(CacheChange.INSERTED, digest)
        return True

    def forget(self, blocks: Iterable[int]) -> None:
        """Makes held blocks unfindable, whose content is not to be trusted. Those without a digest stay as they are."""
        for block in blocks:
            assert self._holds[block] > 0, f"block {block} is not held"
            self._forget(block)

    def quarantine(self, blocks: Iterable[int]) -> list[int]:
        """Drops one hold of each block and quarantines those without further holds; returns these. A block with further
        holds was complete and in the index before other sequences found it, so that it is sound."""
        taken: list[int] = []
        for block in blocks:
            if self._drop_hold(block):
                self._forget(block)  # a peer may still write it
                self._quarantined.add(block)
                taken.append(block)
        return taken

    def unquarantine(self, blocks: Iterable[int]) -> None:
        """Frees quarantined blocks, which provably no peer writes any more."""
        for block in blocks:
            assert block in self._quarantined, f"block {block} is not quarantined"
            self._quarantined.remove(block)
            self._free.append(block)

    def holds(self, block: int) -> int:
        return self._holds[block]

    def quarantined(self, block: int) -> bool:
        return block in self._quarantined

    def statistics(self) -> PoolStatistics:
        return PoolStatistics(
            total=self.blocks,
            free=len(self._free),
            held=self._held,
            cached=len(self._cached) + len(self._protected),
            quarantined=len(self._quarantined),
            evictions=self._evictions,
        )

    def check_integrity(self) -> None:
        """Recounts all books, in O(pool). Raises `PoolCorrupt`, naming the first contradiction."""
        free = set(self._free)
        held = {block for block, holds in enumerate(self._holds) if holds > 0}
        cached = {*self._cached, *self._protected}
        groups = (free, held, cached, self._quarantined)
        self._require(len(free) == len(self._free), "a block is free twice")
        self._require(len(held) == self._held, f"{len(held)} blocks are held, {self._held} are counted")
        sizes = [len(group) for group in groups]
        self._require(sum(sizes) == self.blocks, f"states sum to {sizes} of {self.blocks}")
        self._require(set().union(*groups) == set(range(self.blocks)), "a block is in two states")
        self._require(min(self._holds) >= 0, "a block has a negative number of holds")
        carried = {digest: block for block, digest in enumerate(self._digest) if digest is not None}
        self._require(carried == self._index, "the prefix index differs from the blocks' digests")
        self._require(all(self._digest[b] is not None for b in cached), "a cached block has no digest")
        self._require(all(self._found[b] for b in self._protected), "a protected block was never found")
        self._require(not any(self._found[b] for b in self._cached), "a block that was found has no protection")
        empty = free | self._quarantined
        self._require(not any(self._digest[b] is not None for b in empty), "a free block has a digest")

    def _take(self) -> int:
        if self._free:
            block = self._free.pop()
        else:
            block, _ = (self._cached or self._protected).popitem(last=False)
            self._forget(block)
            self._evictions += 1
        self._holds[block] = 1
        self._held += 1
        return block

    def _drop_hold(self, block: int) -> bool:
        """Whether it was the last hold."""
        assert self._holds[block] > 0, f"block {block} is not held"
        self._holds[block] -= 1
        if self._holds[block]:
            return False
        self._held -= 1
        return True

    def _protect(self, block: int) -> None:
        self._protected[block] = None
        while len(self._protected) > self.blocks // 2:
            longest_ago, _ = self._protected.popitem(last=False)
            self._found[longest_ago] = False
            self._cached[longest_ago] = None

    def _forget(self, block: int) -> None:
        self._found[block] = False
        digest = self._digest[block]
        if digest is not None:
            self._digest[block] = None
            del self._index[digest]
            self._tell(CacheChange.EVICTED, digest)

    def _tell(self, change: CacheChange, digest: bytes) -> None:
        for listener in self.listeners:
            listener(change, digest)

    @staticmethod
    def _require(condition: bool, message: str) -> None:
        if not condition:
            raise PoolCorrupt(message)
