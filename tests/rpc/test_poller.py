"""gRPC's own thread is a batch thread while a burst is written, and only then."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from baton.rpc.poller import Poller, running

pytestmark = pytest.mark.skipif(not hasattr(os, "sched_setscheduler"), reason="no scheduling policies here")


@pytest.fixture
def thread() -> Iterator[threading.Thread]:
    end = threading.Event()
    thread = threading.Thread(target=end.wait, args=(60.0,))
    before = running()
    thread.start()
    assert thread not in before
    yield thread
    end.set()
    thread.join()


def policy(thread: threading.Thread) -> int:
    assert thread.native_id is not None
    return os.sched_getscheduler(thread.native_id)


def test_it_waits_within_a_burst_and_not_after(thread: threading.Thread) -> None:
    poller = Poller()
    poller.find(running() - {thread})
    with poller:
        assert policy(thread) == os.SCHED_BATCH
    assert policy(thread) == os.SCHED_OTHER
    assert os.sched_getscheduler(0) == os.SCHED_OTHER, "the loop itself is not touched"


def test_it_goes_on_after_a_fault_in_a_burst(thread: threading.Thread) -> None:
    poller = Poller()
    poller.find(running() - {thread})
    with pytest.raises(ZeroDivisionError), poller:
        1 / 0  # noqa: B018
    assert policy(thread) == os.SCHED_OTHER


def test_nothing_is_touched_where_it_can_not_be_told(thread: threading.Thread) -> None:
    poller = Poller()
    with poller:
        assert policy(thread) == os.SCHED_OTHER, "not looked for yet"
    poller.find(running())
    with poller:
        assert policy(thread) == os.SCHED_OTHER, "no new thread"


STARTS = """
import asyncio
from baton.rpc.net import start_server
from baton.rpc.poller import Poller, running

async def main():
    before, poller = running(), Poller()
    server = await start_server("127.0.0.1:0", [])
    poller.find(before)
    await server.stop(0)
    print(poller.found)

asyncio.run(main())
"""


def test_a_server_starts_the_thread_that_is_meant() -> None:
    """In a process of its own: gRPC starts it once. What `find` relies on, of the gRPC that is installed."""
    ran = subprocess.run([sys.executable, "-c", STARTS], capture_output=True, text=True, timeout=60, check=True)
    assert ran.stdout.splitlines()[-1] == "True", ran.stderr
