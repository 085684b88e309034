"""Settles a process that has been set up: makes Python's cycle collector rare, and gives unneeded memory back."""

from __future__ import annotations

import ctypes
import gc
import mmap
from collections.abc import Iterator
from pathlib import Path

THRESHOLDS = (50_000, 20, 50)
"""A thousand streams have a thousand writes under way. The default of 700 takes them for garbage; collecting again and
again was a third of a token's cost in the router."""
LEAST_CODE_BYTES = 1 << 20
"""Smaller mappings of code are not worth a call."""


def settle() -> None:
    """Call it once the process is set up: the collector never again looks at the objects of that time (all that torch
    imports takes some 80 ms, a gap between two tokens).

    Gives back the memory that loading freed, which glibc keeps in the arenas of the loading threads. Unmaps code, most
    of which ran only once (torch's is 57 to 99 MB): it stays in the page cache and is mapped again without a read.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*THRESHOLDS)
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
    for start, end in _code(Path("/proc/self/maps")):
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)


def _code(maps: Path) -> Iterator[tuple[int, int]]:
    """Start and end of large mappings of code that come from files and were never written to."""
    if not maps.exists():
        return
    for line in maps.read_text().splitlines():
        addresses, permissions, *rest = line.split(maxsplit=5)
        start, end = (int(address, 16) for address in addresses.split("-"))
        if permissions == "r-xp" and rest[-1].startswith("/") and end - start >= LEAST_CODE_BYTES:
            yield start, end
