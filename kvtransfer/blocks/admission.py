"""Reserves blocks for prompts: the cached prefix first, then fresh blocks."""

from __future__ import annotations

from dataclasses import dataclass

from baton.model import KvLayout
from baton.spec import SequenceSpec
from kvtransfer.blocks.pool import BlockPool
from kvtransfer.blocks.prefix import block_digests, usable_prefix


@dataclass(frozen=True, slots=True)
class Room:
    """A sequence's blocks in order of position; the first `cached_tokens` positions have their KV."""

    blocks: tuple[int, ...]
    cached_tokens: int


class Admission:
    """Reserves blocks, which the caller releases."""

    def __init__(self, pool: BlockPool, layout: KvLayout, fingerprint: str) -> None:
        self._pool, self._layout, self._fingerprint = pool, layout, fingerprint

    def obstacle(self, tokens: int) -> str:
        """Why the pool can never hold `tokens` tokens; empty if it can."""
        blocks = self._layout.blocks_for(tokens)
        capacity = self._pool.statistics().capacity
        return "" if blocks <= capacity else f"the prompt needs {blocks} blocks, the pool has {capacity}"

    def digests(self, spec: SequenceSpec) -> list[bytes]:
        """Digests of the complete blocks of all known tokens. O(tokens)."""
        known = (*spec.prompt, *spec.output)
        return block_digests(known, self._layout.block_tokens, spec.tenant_salt, self._fingerprint)

    def cached(self, spec: SequenceSpec, digests: list[bytes]) -> int:
        """Tokens whose KV the cache has now."""
        return self._pool.peek(self._usable(spec, digests)) * self._layout.block_tokens

    def reserve(self, spec: SequenceSpec, digests: list[bytes], tokens: int) -> Room | None:
        """Blocks for `tokens` positions, at least the known ones; None, and no change, without room.

        The last known token is computed even if the cache has its block: only that gives the next token's logits. It
        may not write into a block that other sequences read, so that its block is a fresh one.
        """
        assert tokens >= spec.known_tokens, "room for all known tokens"
        usable, blocks = self._usable(spec, digests), self._layout.blocks_for(tokens)
        if blocks - self._pool.peek(usable) > self._pool.available:
            return None
        cached = self._pool.match(usable)
        fresh = self._pool.allocate(blocks - len(cached))
        if fresh is None:  # the matched blocks were among the evictable ones
            self._pool.release(cached)
            return None
        return Room((*cached, *fresh), len(cached) * self._layout.block_tokens)

    def remember(self, blocks: list[int], digests: list[bytes]) -> None:
        """Makes computed blocks findable, as far as they are complete."""
        for block, digest in zip(blocks, digests, strict=False):
            self._pool.insert(block, digest)

    def _usable(self, spec: SequenceSpec, digests: list[bytes]) -> list[bytes]:
        block_tokens = self._layout.block_tokens
        return digests[: usable_prefix(spec.known_tokens, len(digests), block_tokens) // block_tokens]
