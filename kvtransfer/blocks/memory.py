"""The memory of a KV pool, one span of blocks that other processes can map, and copies between pools.

The memory is committed at start. A memfd has no name: it vanishes with the last process that holds it, however that
dies. It is sealed against shrinking, growing and further seals, so that no process that maps it gets SIGBUS.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from baton.errors import ConfigError
from baton.model import KvLayout

SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
MADV_POPULATE_WRITE = 23  # Linux 5.14; not named by Python 3.11


class PoolMemory:
    """`blocks` blocks of `layout`, back to back, writable, zeroed, with every page in memory.

    `shared` makes it a sealed memfd, for the `shm` transport; otherwise it is private to the process. Raises
    `ConfigError` with the sizes if there is too little memory.
    """

    def __init__(self, layout: KvLayout, blocks: int, shared: bool = True) -> None:
        if blocks < 1:
            raise ValueError(f"blocks must be at least 1, not {blocks}")
        self.layout = layout
        self.blocks = blocks
        self.bytes = blocks * layout.block_bytes
        self._fd: int | None = None
        _require_room(self.bytes, blocks, layout.block_bytes)
        try:
            if shared:
                self._fd = _sealed_memfd(self.bytes)
                self._map = mmap.mmap(self._fd, self.bytes, mmap.MAP_SHARED | mmap.MAP_POPULATE)
            else:
                self._map = mmap.mmap(-1, self.bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            self._close_fd()
            raise ConfigError(_no_room(self.bytes, blocks, layout.block_bytes, str(error))) from error
        _commit(self._map)
        self.buffer = memoryview(self._map)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))

    @property
    def fd(self) -> int | None:
        """The memfd, owned by this object; None if not shared, or closed."""
        return self._fd

    def block(self, index: int) -> memoryview:
        """Block `index`, writable; valid until `close`."""
        if not 0 <= index < self.blocks:
            raise IndexError(f"block {index} of {self.blocks}")
        size = self.layout.block_bytes
        return self.buffer[index * size : (index + 1) * size]

    def close(self) -> None:
        """Unmaps and closes the memfd. Idempotent. The mapping stays as long as any view of the buffer does, so that no
        address dangles."""
        self._close_fd()
        self.buffer.release()
        with suppress(BufferError):
            self._map.close()

    def _close_fd(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def _sealed_memfd(size: int) -> int:
    fd = os.memfd_create("baton-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size)
        os.posix_fallocate(fd, 0, size)  # fails here; touching missing memory would kill the process
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
    except OSError:
        os.close(fd)
        raise
    return fd


def _commit(mapping: mmap.mmap) -> None:
    """Gives every page its frame now, not at the first token that needs it."""
    with suppress(OSError):  # huge pages are only a gain in speed
        mapping.madvise(mmap.MADV_HUGEPAGE)
    try:
        mapping.madvise(MADV_POPULATE_WRITE)
    except OSError:  # a kernel before 5.14
        for page in range(0, len(mapping), mmap.PAGESIZE):
            mapping[page] = 0


def _require_room(size: int, blocks: int, block_bytes: int) -> None:
    """Refuses more than the available memory: overcommitted memory fails when touched, not when mapped."""
    available = _available_bytes()
    if available is not None and size > available:
        raise ConfigError(_no_room(size, blocks, block_bytes, f"{available / 2**20:.0f} MiB are available"))


def _available_bytes() -> int | None:
    with suppress(OSError, ValueError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


def _no_room(size: int, blocks: int, block_bytes: int, why: str) -> str:
    return f"no memory for the KV pool: {blocks} blocks of {block_bytes} bytes are {size / 2**20:.0f} MiB; {why}"


class BlockCopy(Protocol):
    """Copies blocks between two pools that do not overlap, with the interpreter's lock released."""

    def __call__(self, target: int, source: int, targets: Sequence[int], sources: Sequence[int], size: int) -> None:
        """Copies block `sources[i]` of the pool at address `source` to block `targets[i]` of the one at `target`, with
        `size` bytes a block. On return the bytes are visible to every process that maps the target. The caller ensures
        that both pools are mapped and all blocks inside."""


def copy_runs(target: int, source: int, targets: Sequence[int], sources: Sequence[int], size: int) -> None:
    """A `BlockCopy` without compiled code: one `memmove` for each run of adjacent blocks."""
    for first, count in _runs(targets, sources):
        ctypes.memmove(target + targets[first] * size, source + sources[first] * size, count * size)


def _runs(targets: Sequence[int], sources: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(position, length) of each run in which both lists count up by one."""
    first = 0
    for position in range(1, len(targets) + 1):
        before = position - 1
        if position == len(targets) or any(each[position] != each[before] + 1 for each in (targets, sources)):
            yield first, position - first
            first = position
