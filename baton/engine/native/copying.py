"""The kernels' block copy, for the `shm` transport."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_int64, c_void_p

from baton.engine.native.library import Library


class StreamingCopy:
    """A `kvtransfer.blocks.copying.BlockCopy` with stores that go around the cache, one call for all blocks."""

    def __init__(self, library: Library) -> None:
        self._call = library.calls.baton_copy_blocks
        self._call.restype = None
        self._call.argtypes = (c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_int64)

    def __call__(self, target: int, source: int, targets: Sequence[int], sources: Sequence[int], size: int) -> None:
        """See `BlockCopy`."""
        assert len(targets) == len(sources), "one target for each source"
        array = c_int64 * len(targets)
        into, out_of = array(*targets), array(*sources)
        self._call(target, source, ctypes.addressof(into), ctypes.addressof(out_of), len(targets), size)
