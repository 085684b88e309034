"""Whether there is room for a prompt: its blocks, a cached prefix first."""

from __future__ import annotations

from baton.spec import SequenceSpec
from kvtransfer.layout import KvLayout
from kvtransfer.pool import BlockPool
from kvtransfer.prefix import block_digests, usable_prefix
from prefill_worker.attempt import Attempt


class Admission:
    """Reserves blocks for prompts. The caller gives them back."""

    def __init__(self, pool: BlockPool, layout: KvLayout, fingerprint: str) -> None:
        self._pool, self._layout, self._fingerprint = pool, layout, fingerprint

    def obstacle(self, spec: SequenceSpec) -> str:
        """Why this prompt could never be computed here; empty when it could."""
        blocks = self._layout.blocks_for(spec.known_tokens)
        capacity = self._pool.statistics().capacity
        return "" if blocks <= capacity else f"the prompt needs {blocks} blocks, the pool has {capacity}"

    def reserve(self, attempt: Attempt) -> bool:
        """Blocks for the whole prompt; False, and no change, without room.

        The last token is always computed, also when the cache has its block: only that gives the logits of the first
        output token, and it may not write into a block that others read.
        """
        spec, block_tokens = attempt.spec, self._layout.block_tokens
        if not attempt.digests:
            known = (*spec.prompt, *spec.output)
            attempt.digests = block_digests(known, block_tokens, spec.tenant_salt, self._fingerprint)
        usable = usable_prefix(spec.known_tokens, len(attempt.digests), block_tokens) // block_tokens
        digests = attempt.digests[:usable]
        blocks = self._layout.blocks_for(spec.known_tokens)
        if blocks - self._pool.peek(digests) > self._pool.available:
            return False
        cached = self._pool.match(digests)
        fresh = self._pool.allocate(blocks - len(cached))
        if fresh is None:  # what matched was itself among the blocks that could be evicted
            self._pool.release(cached)
            return False
        attempt.blocks = [*cached, *fresh]
        attempt.cached_tokens = len(cached) * block_tokens
        return True

    def remember(self, attempt: Attempt) -> None:
        """The prompt is computed: its complete blocks can be found from now on."""
        for block, digest in zip(attempt.blocks, attempt.digests, strict=False):
            self._pool.insert(block, digest)
