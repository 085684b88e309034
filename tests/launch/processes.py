"""Waiting for processes to be gone, with a deadline."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable

import psutil

GONE_S = 10.0


def wait_gone(pids: Iterable[int]) -> list[int]:
    """The process ids that are still there at the deadline; a zombie without another thread is gone."""
    left = list(pids)
    deadline = time.monotonic() + GONE_S
    while left and time.monotonic() < deadline:
        left = [pid for pid in left if _runs(pid)]
        time.sleep(0.02)
    return left


def _runs(pid: int) -> bool:
    try:
        # A killed process is a zombie as soon as its first thread has ended; while any other is still ending, all its
        # sockets are open and its ports taken.
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE or len(os.listdir(f"/proc/{pid}/task")) > 1
    except (psutil.NoSuchProcess, FileNotFoundError):
        return False
