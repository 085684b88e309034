"""What one step computes, worked out once for all layers.

The tokens of a step lie flat, one after the other: first every sequence that computes one token (decode), grouped by
length, then the chunks (prefill). Linear layers see them all together; attention goes by group and by tile.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch

from baton.engine.api import Work
from baton.engine.kv import KvPool
from baton.engine.state import SequenceState, state_of

GROUP_WASTE = 1.25
"""A group may gather this many times the keys its sequences have: padding against calls."""
TILE_QUERIES = 256
"""Queries of one attention call over a cached prefix: less is masked away in small tiles, more is fewer calls."""


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Sequences of like length with one query each, at rows [start, stop).

    `shares` says where their blocks lie (`KvPool.gather`); `length` is the longest, with this step's token. `mask`
    [S, 1, 1, length] is 0 where a key belongs to its sequence, else -inf; None where all are equally long.
    """

    start: int
    stop: int
    shares: torch.Tensor
    length: int
    mask: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class Tile:
    """Queries at rows [start, stop) of a chunk that see keys [0, length); `mask` [queries, length] is additive."""

    start: int
    stop: int
    length: int
    mask: torch.Tensor


@dataclass(frozen=True, slots=True)
class Chunk:
    """Several tokens of one sequence, at rows [start, stop). Without a prefix (`shares` None) it sees only itself."""

    start: int
    stop: int
    shares: torch.Tensor | None
    tiles: tuple[Tile, ...]


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step. `order` lists the batch's work items as their rows follow each other; the tensors are [T], int64.

    `sampled` are the work items that sample and `sampled_rows` the rows of their last tokens.
    """

    order: tuple[int, ...]
    tokens: torch.Tensor
    positions: torch.Tensor
    blocks: torch.Tensor
    offsets: torch.Tensor
    groups: tuple[DecodeGroup, ...]
    chunks: tuple[Chunk, ...]
    sampled: tuple[int, ...]
    sampled_rows: torch.Tensor


def make_plan(batch: Seq[Work], pool: KvPool) -> StepPlan:
    """Plans a step over `batch`, whose sequences' blocks cover what is computed."""
    groups_of = _group([(index, _end(work)) for index, work in enumerate(batch) if work.count == 1])
    chunked = [index for index, work in enumerate(batch) if work.count > 1]
    order = tuple([index for group in groups_of for index in group] + chunked)
    states = [state_of(work.sequence) for work in batch]
    device = pool.blocks.device
    positions = torch.cat([torch.arange(batch[i].sequence.computed, _end(batch[i])) for i in order])
    tables = torch.cat([_blocks_of(batch[i], states[i], pool.layout.block_tokens) for i in order])
    groups, chunks, row = [], [], 0
    for members in groups_of:
        groups.append(_decode_group(row, [batch[i] for i in members], [states[i] for i in members], pool))
        row += len(members)
    for index in chunked:
        chunks.append(_chunk(row, batch[index], states[index], pool))
        row += batch[index].count
    last_rows = _last_rows([batch[i].count for i in order])
    sampled = [(index, last) for index, last in zip(order, last_rows, strict=True) if batch[index].samples]
    return StepPlan(
        order=order,
        tokens=torch.tensor([token for i in order for token in _tokens(batch[i])], device=device),
        positions=positions.to(device),
        blocks=tables.to(device),
        offsets=(positions % pool.layout.block_tokens).to(device),
        groups=tuple(groups),
        chunks=tuple(chunks),
        sampled=tuple(index for index, _ in sampled),
        sampled_rows=torch.tensor([last for _, last in sampled], dtype=torch.int64, device=device),
    )


def _end(work: Work) -> int:
    return work.sequence.computed + work.count


def _tokens(work: Work) -> list[int]:
    return work.sequence.tokens[work.sequence.computed : _end(work)]


def _blocks_of(work: Work, state: SequenceState, block_tokens: int) -> torch.Tensor:
    """The block of each token that `work` computes."""
    positions = torch.arange(work.sequence.computed, _end(work))
    return state.table[positions // block_tokens]


def _last_rows(counts: list[int]) -> list[int]:
    rows, row = [], -1
    for count in counts:
        row += count
        rows.append(row)
    return rows


def _group(lengths: list[tuple[int, int]]) -> list[list[int]]:
    """Cuts (index, length) pairs into groups whose padded size stays within GROUP_WASTE of what is in them."""
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


def _decode_group(start: int, works: list[Work], states: list[SequenceState], pool: KvPool) -> DecodeGroup:
    lengths = [_end(work) for work in works]
    length = max(lengths)
    blocks = pool.layout.blocks_for(length)
    tables = torch.zeros((len(works), blocks), dtype=torch.int64)
    for row, (state, own) in enumerate(zip(states, lengths, strict=True)):
        held = pool.layout.blocks_for(own)
        tables[row, :held] = state.table[:held]
    mask = None
    if min(lengths) < length:
        hidden = torch.arange(length) >= torch.tensor(lengths)[:, None]
        mask = _additive(hidden, pool.blocks)[:, None, None]
    return DecodeGroup(start, start + len(works), pool.shares(tables.to(pool.blocks.device)), length, mask)


def _chunk(start: int, work: Work, state: SequenceState, pool: KvPool) -> Chunk:
    prefix, stop = work.sequence.computed, start + work.count
    if prefix == 0:
        return Chunk(start, stop, None, ())
    table = state.table[: pool.layout.blocks_for(_end(work))]
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
