"""Whatever a test opens, it closes: a leak fails it."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvtransfer.transports.nixl.agent import available
from tests.kvtransfer.transports.harness import Bench

needs_nixl = pytest.mark.skipif(not available(), reason="the package nixl is not installed: make test-nixl")


def _descriptors() -> set[tuple[int, str]]:
    found = set()
    for entry in Path("/proc/self/fd").iterdir():
        try:
            found.add((int(entry.name), os.readlink(entry)))
        except FileNotFoundError:
            continue  # the one that reads the directory
    return found


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    threads, descriptors = set(threading.enumerate()), _descriptors()
    segments = set(os.listdir("/dev/shm"))
    yield
    assert set(threading.enumerate()) <= threads, "a thread is left"
    assert _descriptors() - descriptors == set(), "a descriptor is left"
    own = {name for name in set(os.listdir("/dev/shm")) - segments if "baton" in name}
    assert own == set(), "a segment is left"


@pytest.fixture(params=["memory", "shm", "tcp", "nccl", pytest.param("nixl", marks=needs_nixl)])
def bench(request: pytest.FixtureRequest, nothing_left: None) -> Iterator[Bench]:
    bench = Bench(request.param)
    yield bench
    bench.close()
