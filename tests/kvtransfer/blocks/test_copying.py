"""Copies within a machine: every byte in its place and no other touched, whichever way they are made."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest

from baton.engine.native.build import NativeUnavailable
from baton.engine.native.library import load
from kvtransfer.blocks.memory import BlockCopy, copy_runs

BLOCKS = 9


@pytest.fixture(params=["runs", "streaming"])
def copy(request: pytest.FixtureRequest) -> BlockCopy:
    if request.param == "runs":
        return copy_runs
    try:
        return load().copy_blocks
    except NativeUnavailable as why:
        pytest.skip(str(why))


def copied(copy: BlockCopy, size: int, offset: int, targets: Sequence[int], sources: Sequence[int]) -> None:
    """`offset` shifts the target against cache lines, which pools never are but a layout's block may be."""
    source = np.random.default_rng(size).integers(0, 256, (BLOCKS, size), dtype=np.uint8)
    target = np.full(BLOCKS * size + 64 + offset, 7, np.uint8)
    copy(target.ctypes.data + offset, source.ctypes.data, targets, sources, size)
    expected = np.full_like(target, 7)
    for t, s in zip(targets, sources, strict=True):
        expected[offset + t * size : offset + (t + 1) * size] = source[s]
    assert np.array_equal(target, expected)


@pytest.mark.parametrize("size", [1, 63, 64, 255, 256, 257, 1000, 4096, 368_640 // 8])
@pytest.mark.parametrize("offset", [0, 1, 16, 63])
def test_bytes_arrive_in_place(copy: BlockCopy, size: int, offset: int) -> None:
    generator = random.Random(size)
    copied(copy, size, offset, generator.sample(range(BLOCKS), 5), generator.sample(range(BLOCKS), 5))


def test_runs_of_either_side_start_and_stop_anywhere(copy: BlockCopy) -> None:
    copied(copy, 100, 0, [0, 1, 2, 5, 6, 8, 3], [3, 4, 6, 7, 8, 0, 1])
    copied(copy, 100, 0, range(BLOCKS), range(BLOCKS))
    copied(copy, 100, 0, [4], [4])
    copied(copy, 100, 0, [], [])
