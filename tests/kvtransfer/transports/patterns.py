"""Bytes that tell which block of which writer they are."""

from __future__ import annotations

import hashlib

from kvtransfer.blocks.memory import PoolMemory


def pattern(seed: int, block: int, size: int) -> bytes:
    unit = hashlib.sha512(f"{seed}/{block}".encode()).digest()
    return (unit * (size // len(unit) + 1))[:size]


def fill(memory: PoolMemory, seed: int) -> None:
    for block in range(memory.blocks):
        memory.block(block)[:] = pattern(seed, block, memory.layout.block_bytes)
