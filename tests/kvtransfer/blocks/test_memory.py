from __future__ import annotations

import fcntl
import mmap
import os

import pytest

from baton.errors import ConfigError
from baton.model import KvLayout
from kvtransfer.blocks import memory as module
from kvtransfer.blocks.memory import PoolMemory

LAYOUT = KvLayout(layers=2, kv_heads=1, head_dim=16, dtype="float32")


@pytest.mark.parametrize("shared", [True, False])
def test_blocks_are_disjoint_and_writable(shared: bool) -> None:
    memory = PoolMemory(LAYOUT, 3, shared)
    for block in range(3):
        memory.block(block)[:] = bytes([block + 1]) * LAYOUT.block_bytes
    assert bytes(memory.buffer) == b"".join(bytes([b + 1]) * LAYOUT.block_bytes for b in range(3))
    for outside in (-1, 3):
        with pytest.raises(IndexError):
            memory.block(outside)
    assert (memory.fd is not None) == shared
    memory.close()
    memory.close()
    assert memory.fd is None


def test_the_memfd_is_sealed_and_shared() -> None:
    memory = PoolMemory(LAYOUT, 2)
    assert memory.fd is not None
    for change in (0, 3 * memory.bytes):
        with pytest.raises(PermissionError):
            os.ftruncate(memory.fd, change)
    with pytest.raises(PermissionError):
        fcntl.fcntl(memory.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    with mmap.mmap(memory.fd, memory.bytes) as other:
        other[LAYOUT.block_bytes] = 7
        assert memory.block(1)[0] == 7
    memory.close()


def test_pages_are_there_from_the_start() -> None:
    memory = PoolMemory(LAYOUT, 64)
    assert memory.fd is not None
    assert os.fstat(memory.fd).st_blocks * 512 >= memory.bytes
    memory.close()


def test_a_view_outlives_close() -> None:
    memory = PoolMemory(LAYOUT, 1)
    view = memory.block(0)
    memory.close()
    view[0] = 1  # still mapped
    view.release()


def test_too_much_is_a_config_error_with_sizes() -> None:
    for shared in (True, False):
        with pytest.raises(ConfigError, match=r"blocks of 4096 bytes are \d+ MiB"):
            PoolMemory(LAYOUT, 2**40, shared)
    with pytest.raises(ValueError, match="blocks"):
        PoolMemory(LAYOUT, 0)


def test_an_allocation_that_fails_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", fail)
    with pytest.raises(ConfigError, match="No space left"):
        PoolMemory(LAYOUT, 2)


def test_an_old_kernel_touches_each_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MADV_POPULATE_WRITE", 9999)
    memory = PoolMemory(LAYOUT, 8)
    assert not any(memory.buffer)
    memory.close()
