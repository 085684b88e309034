"""Python's cycle collector in a process that serves: rarely, and never over what stays for ever."""

from __future__ import annotations

import ctypes
import gc

THRESHOLDS = (50_000, 20, 50)
"""A thousand streams have a thousand writes under way, which the default of 700 takes for garbage piling up: collecting
them again and again was a third of a token's cost in the router."""


def settle() -> None:
    """To be called once the process is set up: what is there by then, modules and a model, is not looked at again.

    Looking through everything that torch imports takes some 80 ms, which a stream sees as a gap between two tokens.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*THRESHOLDS)
    _give_back()


def _give_back() -> None:
    """What loading took and freed goes back to the system: glibc keeps it in the arenas of the threads that loaded."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
