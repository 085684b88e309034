"""How blocks are copied within one machine's memory."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from typing import Protocol


class BlockCopy(Protocol):
    """Copies blocks between two pools that do not overlap. Releases the interpreter lock while bytes move."""

    def __call__(self, target: int, source: int, targets: Sequence[int], sources: Sequence[int], size: int) -> None:
        """Block `sources[i]` of the pool at address `source` becomes block `targets[i]` of the one at `target`; each
        has `size` bytes. When it returns the bytes are visible to every process that maps the target. The caller
        answers for both pools being mapped and the blocks being inside."""


def copy_runs(target: int, source: int, targets: Sequence[int], sources: Sequence[int], size: int) -> None:
    """A `BlockCopy` that needs no compiled code: one `memmove` for each run of neighbours."""
    for first, count in _runs(targets, sources):
        ctypes.memmove(target + targets[first] * size, source + sources[first] * size, count * size)


def _runs(targets: Sequence[int], sources: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(position, length) of stretches in which both lists count up by one."""
    first = 0
    for position in range(1, len(targets) + 1):
        if (
            position == len(targets)
            or targets[position] != targets[position - 1] + 1
            or sources[position] != sources[position - 1] + 1
        ):
            yield first, position - first
            first = position
