"""Reserves blocks for prompts: the cached prefix first, then fresh blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from baton.model import KvLayout
from baton.spec import SequenceSpec
from kvtransfer.blocks.pool import BlockPool
from kvtransfer.blocks.prefix import block_digests, usable_prefix

GROWTH_TOKENS = 32
"""Of its output, what a sequence gets room for at first; and how far beyond its likely length it is expected to go."""


class Need(NamedTuple):
    """Positions of a sequence whose KV needs room: those that are known, those to begin with, those of its likely
    length, and the most."""

    known: int
    first: int
    likely: int
    most: int

    @classmethod
    def of(cls, spec: SequenceSpec) -> Need:
        """Without a likely length it begins with room for everything."""
        known, most = spec.known_tokens, spec.kv_tokens
        if not spec.likely_tokens:
            return cls(known, most, most, most)
        return cls.of_lengths(len(spec.prompt), len(spec.output), spec.likely_tokens, spec.max_tokens)

    @classmethod
    def of_lengths(cls, prompt: int, output: int, likely_tokens: int, max_tokens: int) -> Need:
        """Of a prompt and the `output` so far, in tokens; the whole output is likely to have `likely_tokens`."""
        known, most = prompt + output, prompt + max_tokens - 1
        likely = min(prompt + max(likely_tokens, output + GROWTH_TOKENS) - 1, most)
        return cls(known, min(known + GROWTH_TOKENS - 1, likely), likely, most)


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
        """Why the pool could never hold `tokens` tokens, however empty; empty if it could. Quarantine ends some day."""
        blocks, there = self._layout.blocks_for(tokens), self._pool.blocks
        return "" if blocks <= there else f"the sequence may need {blocks} blocks, the pool has {there}"

    def digests(self, spec: SequenceSpec) -> list[bytes]:
        """Digests of the complete blocks of all known tokens. O(tokens)."""
        known = (*spec.prompt, *spec.output)
        return block_digests(known, self._layout.block_tokens, spec.tenant_salt, self._fingerprint)

    def cached(self, spec: SequenceSpec, digests: list[bytes]) -> int:
        """Tokens whose KV the cache has now."""
        return self._pool.peek(self.usable(spec, digests)) * self._layout.block_tokens

    def reserve(self, spec: SequenceSpec, digests: list[bytes], tokens: int) -> Room | None:
        """Blocks for `tokens` positions, at least the known ones; None, and no change, without room.

        The last known token is computed even if the cache has its block: only that gives the next token's logits. It
        may not write into a block that other sequences read, so that its block is a fresh one.
        """
        assert tokens >= spec.known_tokens, "room for all known tokens"
        usable, blocks = self.usable(spec, digests), self._layout.blocks_for(tokens)
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

    def usable(self, spec: SequenceSpec, digests: list[bytes]) -> list[bytes]:
        """Those of the blocks that need not be computed here."""
        block_tokens = self._layout.block_tokens
        return digests[: usable_prefix(spec.known_tokens, len(digests), block_tokens) // block_tokens]
