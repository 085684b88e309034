"""The plan of a step, made once for all layers.

The tokens of a step lie flat, one after the other: first every sequence that computes one token (decode), grouped by
length, then the chunks (prefill). Linear layers compute them all together, attention goes by group and by tile.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch

from baton.engine.api import Work
from baton.engine.kv import KvPool
from baton.engine.stepper import state_of

GROUP_WASTE = 1.25
"""Keys that a group may gather over the keys that its sequences have: less padding against fewer calls."""
TILE_QUERIES = 256
"""Queries of one attention call over a prefix: smaller tiles mask fewer scores away, larger ones take fewer calls."""


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Sequences of like length with one query each, at rows [start, stop).

    `shares` are their blocks' indices for `KvPool.gather`; `length` is the longest, with this step's token. `mask`
    [S, 1, 1, length] is 0 for a sequence's own keys, else -inf; None if all are equally long.
    """

    start: int
    stop: int
    shares: torch.Tensor
    length: int
    mask: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class Tile:
    """Queries at rows [start, stop) that attend to keys [0, length); `mask` [queries, length] is additive."""

    start: int
    stop: int
    length: int
    mask: torch.Tensor


@dataclass(frozen=True, slots=True)
class Chunk:
    """Several tokens of one sequence, at rows [start, stop). With `shares` None there is no prefix to attend to."""

    start: int
    stop: int
    shares: torch.Tensor | None
    tiles: tuple[Tile, ...]


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step; the tensors are int64, [T] but for `sampled_rows`. `sampled` are the indices of the work items that
    sample, `sampled_rows` the rows of their last tokens."""

    tokens: torch.Tensor
    positions: torch.Tensor
    blocks: torch.Tensor
    offsets: torch.Tensor
    groups: tuple[DecodeGroup, ...]
    chunks: tuple[Chunk, ...]
    sampled: tuple[int, ...]
    sampled_rows: torch.Tensor


def make_plan(batch: Seq[Work], pool: KvPool) -> StepPlan:
    """Plans a step over `batch`, whose sequences' blocks cover all positions to compute."""
    groups = _group([(index, _end(work)) for index, work in enumerate(batch) if work.count == 1])
    chunks = [index for index, work in enumerate(batch) if work.count > 1]
    order = [index for group in groups for index in group] + chunks
    works = [batch[index] for index in order]
    first_rows = dict(zip(order, itertools.accumulate((work.count for work in works), initial=0), strict=False))
    sampled = tuple(index for index in order if batch[index].samples)
    positions = [torch.arange(work.sequence.computed, _end(work)) for work in works]
    size, device = pool.layout.block_tokens, pool.blocks.device
    blocks = [_table(work)[own // size] for work, own in zip(works, positions, strict=True)]
    tokens = [token for work in works for token in work.sequence.tokens[work.sequence.computed : _end(work)]]
    return StepPlan(
        tokens=torch.tensor(tokens, device=device),
        positions=torch.cat(positions).to(device),
        blocks=torch.cat(blocks).to(device),
        offsets=(torch.cat(positions) % size).to(device),
        groups=tuple(_decode_group(first_rows[group[0]], [batch[i] for i in group], pool) for group in groups),
        chunks=tuple(_chunk(first_rows[index], batch[index], pool) for index in chunks),
        sampled=sampled,
        sampled_rows=torch.tensor([first_rows[i] + batch[i].count - 1 for i in sampled], dtype=torch.int64).to(device),
    )


def _end(work: Work) -> int:
    return work.sequence.computed + work.count


def _table(work: Work) -> torch.Tensor:
    return state_of(work.sequence).table


def _group(lengths: list[tuple[int, int]]) -> list[list[int]]:
    """Groups the indices of (index, length) pairs; a padded group is at most GROUP_WASTE times its lengths' sum."""
    groups: list[list[int]] = []
    total = longest = 0
    for index, length in sorted(lengths, key=lambda pair: (-pair[1], pair[0])):
        if groups and longest * (len(groups[-1]) + 1) <= GROUP_WASTE * (total + length):
            groups[-1].append(index)
            total += length
        else:
            groups.append([index])
            total = longest = length
    return groups


def _decode_group(start: int, works: list[Work], pool: KvPool) -> DecodeGroup:
    lengths = [_end(work) for work in works]
    length = max(lengths)
    blocks = pool.layout.blocks_for(length)
    tables = torch.zeros((len(works), blocks), dtype=torch.int64)
    for row, work in enumerate(works):
        held = pool.layout.blocks_for(lengths[row])
        tables[row, :held] = _table(work)[:held]
    mask = None
    if min(lengths) < length:
        hidden = torch.arange(length) >= torch.tensor(lengths)[:, None]
        mask = _additive(hidden, pool.blocks)[:, None, None]
    return DecodeGroup(start, start + len(works), pool.shares(tables.to(pool.blocks.device)), length, mask)


def _chunk(start: int, work: Work, pool: KvPool) -> Chunk:
    prefix, stop = work.sequence.computed, start + work.count
    if prefix == 0:
        return Chunk(start, stop, None, ())
    table = _table(work)[: pool.layout.blocks_for(_end(work))]
    tiles = []
    for first in range(start, stop, TILE_QUERIES):
        last = min(first + TILE_QUERIES, stop)
        length = prefix + last - start
        positions = torch.arange(prefix + first - start, length)
        hidden = torch.arange(length) > positions[:, None]
        tiles.append(Tile(first, last, length, _additive(hidden, pool.blocks)))
    return Chunk(start, stop, pool.shares(table[None].to(pool.blocks.device)), tuple(tiles))


def _additive(hidden: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """0 where visible and -inf where `hidden`, in the dtype that attention computes in."""
    mask = torch.zeros(hidden.shape, dtype=like.dtype)
    return mask.masked_fill_(hidden, float("-inf")).to(like.device)
