"""The engine's view of the block pool: paged keys and values."""

from __future__ import annotations

import mmap

import torch

from baton.model import KvLayout

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""The dtypes of torch's arithmetic; a pool of another dtype is bytes."""
Buffer = memoryview | mmap.mmap | bytearray
"""Memory that the caller owns and that can be written."""


class KvPool:
    """Blocks of keys and values, `[block][layer][key|value][kv head][token][dim]`, contiguous.

    One indexed read gathers whole head shares (16 tokens of one head), so that keys come out head-major, ready for
    attention, with a single copy.
    """

    def __init__(self, blocks: torch.Tensor, layout: KvLayout) -> None:
        """`blocks` [blocks, *layout.shape] stays the caller's memory."""
        assert blocks.shape[1:] == layout.shape, "the pool has the layout's shape"
        self.layout = layout
        self.blocks = blocks
        self._shares = blocks.view(-1, blocks.shape[4:].numel())
        kinds = torch.arange(2, device=blocks.device)[:, None] * layout.kv_heads
        self._share_offsets = kinds + torch.arange(layout.kv_heads, device=blocks.device)

    @property
    def count(self) -> int:
        return self.blocks.shape[0]

    def write(self, layer: int, blocks: torch.Tensor, offsets: torch.Tensor, kv: torch.Tensor) -> None:
        """Stores `kv` [T, 2, kv_heads, head_dim] at token `offsets` [T] of `blocks` [T] (int64)."""
        self.blocks[:, layer][blocks, :, :, offsets] = kv

    def shares(self, tables: torch.Tensor) -> torch.Tensor:
        """Indices of layer 0 of the blocks in `tables` [S, blocks], for `gather`: [2, S, kv_heads, blocks]."""
        per_block = self.layout.layers * 2 * self.layout.kv_heads
        return tables[None, :, None] * per_block + self._share_offsets[:, None, :, None]

    def gather(self, layer: int, shares: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies of the keys and values at `shares`, each [S, kv_heads, blocks * 16, head_dim]."""
        _, sequences, heads, blocks = shares.shape
        rows = (shares + layer * 2 * heads).view(-1)
        found = self._shares.index_select(0, rows)
        keys, values = found.view(2, sequences, heads, blocks * self.layout.block_tokens, self.layout.head_dim)
        return keys, values


def make_pool(layout: KvLayout, buffer: Buffer | None, blocks: int | None, device: str = "cpu") -> KvPool:
    """A pool of as many whole blocks as fit into `buffer`, the caller's writable memory, or of `blocks` blocks in its
    own memory: give one of the two. The tensor keeps the buffer exported: an mmap can be closed only after the pool is
    dropped."""
    storage = TORCH_DTYPES.get(layout.dtype, torch.uint8)
    if buffer is None:
        assert blocks is not None, "give either the pool's memory or its size"
        return KvPool(torch.zeros((blocks, *layout.shape), dtype=storage, device=device), layout)
    assert blocks is None, "give either the pool's memory or its size"
    memory = memoryview(buffer).cast("B")
    count = len(memory) // layout.block_bytes
    assert count > 0, "the pool's memory holds at least one block"
    assert not memory.readonly, "the pool's memory is writable"
    flat = torch.frombuffer(memory[: count * layout.block_bytes], dtype=storage)
    return KvPool(flat.view(count, *layout.shape), layout)
