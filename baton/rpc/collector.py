"""A process that serves, once it is set up: Python's cycle collector comes rarely and never over what stays for ever,
and the system gets back what is not needed any more."""

from __future__ import annotations

import ctypes
import gc
import mmap
from collections.abc import Iterator
from pathlib import Path

THRESHOLDS = (50_000, 20, 50)
"""A thousand streams have a thousand writes under way, which the default of 700 takes for garbage piling up: collecting
them again and again was a third of a token's cost in the router."""
LEAST_CODE_BYTES = 1 << 20
"""Of a library whose code is let go of; those of smaller ones are not worth a call."""


def settle() -> None:
    """To be called once the process is set up: what is there by then, modules and a model, is not looked at again.

    Looking through everything that torch imports takes some 80 ms, which a stream sees as a gap between two tokens.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*THRESHOLDS)
    _give_back()


def _give_back() -> None:
    """What only setting up needed. Memory that loading freed: glibc keeps it in the arenas of the threads that loaded.
    And the code that was run once: torch's alone is 57 to 99 MB in memory, by how the file happens to lie in the page
    cache. It stays there, so what is run again is mapped again without a read."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
    for start, end in _code(Path("/proc/self/maps")):
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)


def _code(maps: Path) -> Iterator[tuple[int, int]]:
    """Start and end of large mappings of code: of files, and never written to, so that nothing is lost with them."""
    if not maps.exists():
        return
    for line in maps.read_text().splitlines():
        addresses, permissions, *rest = line.split(maxsplit=5)
        start, end = (int(address, 16) for address in addresses.split("-"))
        if permissions == "r-xp" and rest[-1].startswith("/") and end - start >= LEAST_CODE_BYTES:
            yield start, end
