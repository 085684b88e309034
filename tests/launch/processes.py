"""Waiting for processes to be gone, with a deadline."""

from __future__ import annotations

import time
from collections.abc import Iterable

import psutil

GONE_S = 10.0


def wait_gone(pids: Iterable[int]) -> list[int]:
    """The process ids that are still there at the deadline; a zombie is gone."""
    left = list(pids)
    deadline = time.monotonic() + GONE_S
    while left and time.monotonic() < deadline:
        left = [pid for pid in left if _runs(pid)]
        time.sleep(0.02)
    return left


def _runs(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
