"""Chained digests of tokens: equal for blocks with equal KV.

    root      = H(len(salt) as uint32 | salt | fingerprint)
    digest[0] = H(root | tokens of block 0)
    digest[i] = H(digest[i-1] | tokens of block i)

H is SHA-256 truncated to 128 bits; token ids are little-endian uint32, strings are UTF-8. So a digest identifies the
whole prefix up to its block, for one tenant salt and one fingerprint (weights, architecture, KV dtype and layout).
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Sequence
from functools import lru_cache

from baton.model import BLOCK_TOKENS

DIGEST_BYTES = 16
ROOTS = 1024
"""Cached roots: one per tenant and fingerprint."""


@lru_cache(ROOTS)
def prefix_root(salt: str, fingerprint: str) -> bytes:
    """The parent of every first block. With the salt's length in it no two pairs have the same root."""
    raw = salt.encode()
    return _digest(struct.pack("<I", len(raw)) + raw + fingerprint.encode())


def each_digest(
    tokens: Sequence[int], block_tokens: int = BLOCK_TOKENS, salt: str = "", fingerprint: str = ""
) -> Iterator[bytes]:
    """`block_digests`, computed one by one as they are consumed. Raises `struct.error` for ids outside [0, 2**32)."""
    pack, parent = struct.Struct(f"<{block_tokens}I").pack, prefix_root(salt, fingerprint)
    for start in range(0, len(tokens) - block_tokens + 1, block_tokens):
        parent = _digest(parent + pack(*tokens[start : start + block_tokens]))
        yield parent


class Digests:
    """`each_digest` that can be iterated repeatedly: computes each digest when first needed, and keeps it (16 bytes).
    For one event loop. Holds the tokens."""

    def __init__(self, tokens: Sequence[int], block_tokens: int, salt: str, fingerprint: str) -> None:
        self._made: list[bytes] = []
        self._rest = each_digest(tokens, block_tokens, salt, fingerprint)

    def __iter__(self) -> Iterator[bytes]:
        made = self._made
        yield from made
        for digest in self._rest:
            made.append(digest)
            yield digest


def block_digests(
    tokens: Sequence[int], block_tokens: int = BLOCK_TOKENS, salt: str = "", fingerprint: str = ""
) -> list[bytes]:
    """One digest per complete block of `tokens`."""
    return list(each_digest(tokens, block_tokens, salt, fingerprint))


def usable_prefix(tokens: int, cached_blocks: int, block_tokens: int = BLOCK_TOKENS) -> int:
    """How many of `tokens` prompt tokens need not be computed with the first `cached_blocks` blocks cached.

    Even a full hit recomputes the last prompt token: only that gives the logits for the first token. Its cached KV is
    in a shared block and must not change there.
    """
    assert tokens >= 1, "a prompt has at least one token"
    return min(cached_blocks * block_tokens, tokens - 1)


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()[:DIGEST_BYTES]
