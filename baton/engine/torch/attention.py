"""Attention of one layer over a planned step: causal within a sequence, grouped queries, keys from the pool."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from baton.engine.kv import KvPool
from baton.engine.torch.plan import Chunk, DecodeGroup, StepPlan


def attend(
    pool: KvPool, layer: int, plan: StepPlan, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
) -> torch.Tensor:
    """The output of all heads, [T, heads, head_dim], from `queries` of that shape and this step's `keys` and `values`
    [T, kv_heads, head_dim], which the pool has already."""
    out = torch.empty_like(queries)
    for group in plan.groups:
        out[group.start : group.stop] = _decode(pool, layer, group, queries[group.start : group.stop])
    for chunk in plan.chunks:
        if chunk.shares is None:
            rows = slice(chunk.start, chunk.stop)
            out[rows] = _alone(queries[rows], keys[rows], values[rows])
        else:
            _over_prefix(pool, layer, chunk, chunk.shares, queries, out)
    return out


def _decode(pool: KvPool, layer: int, group: DecodeGroup, queries: torch.Tensor) -> torch.Tensor:
    """One query per sequence: the queries that share a key/value head are rows of one product."""
    count, heads, dim = queries.shape
    keys, values = pool.gather(layer, group.shares)
    rows = queries.view(count, pool.layout.kv_heads, -1, dim)
    keys, values = keys[:, :, : group.length], values[:, :, : group.length]
    found = F.scaled_dot_product_attention(rows, keys, values, attn_mask=group.mask)
    return found.reshape(count, heads, dim)


def _alone(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """A chunk that starts its sequence attends only to itself, so that it reads nothing from the pool."""
    grouped = _grouped(queries, keys.shape[1])
    keys, values = _shared(keys.transpose(0, 1), grouped), _shared(values.transpose(0, 1), grouped)
    return _flat(F.scaled_dot_product_attention(grouped, keys, values, is_causal=True))


def _over_prefix(
    pool: KvPool, layer: int, chunk: Chunk, shares: torch.Tensor, queries: torch.Tensor, out: torch.Tensor
) -> None:
    """Writes a chunk's attention over its sequence, up to each query, to `out`."""
    keys, values = pool.gather(layer, shares)
    for tile in chunk.tiles:
        grouped = _grouped(queries[tile.start : tile.stop], pool.layout.kv_heads)
        tile_keys, tile_values = (_shared(each[0, :, : tile.length], grouped) for each in (keys, values))
        found = F.scaled_dot_product_attention(grouped, tile_keys, tile_values, attn_mask=tile.mask)
        out[tile.start : tile.stop] = _flat(found)


def _grouped(queries: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """[T, heads, dim] as [kv_heads, queries per kv head, T, dim]; a view."""
    tokens, _, dim = queries.shape
    return queries.view(tokens, kv_heads, -1, dim).permute(1, 2, 0, 3)


def _shared(keys: torch.Tensor, grouped: torch.Tensor) -> torch.Tensor:
    """[kv_heads, T, dim] repeated for each query head of its group, without a copy."""
    return keys[:, None].expand(-1, grouped.shape[1], -1, -1)


def _flat(found: torch.Tensor) -> torch.Tensor:
    """[kv_heads, group, T, dim] back to [T, heads, dim]."""
    return found.permute(2, 0, 1, 3).flatten(1, 2)
