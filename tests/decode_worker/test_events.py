"""From the transports' threads to the role's loop."""

from __future__ import annotations

import asyncio
import threading
from typing import Any, cast

from baton.spec import HandoffKey
from decode_worker.handoffs import LoopEvents
from kvtransfer.transports.base import ReceiverEvents
from tests.rpc.waiting import until

KEY = HandoffKey(b"k" * 16, 1)


class Recorder:
    """Stands in for the role."""

    def __init__(self) -> None:
        self.heard: list[tuple[Any, ...]] = []
        self.threads: set[int] = set()

    def __getattr__(self, name: str) -> Any:
        def hear(*arguments: Any) -> None:
            self.heard.append((name, *arguments))
            self.threads.add(threading.get_ident())

        return hear


async def test_everything_arrives_in_order_on_the_loop() -> None:
    role = Recorder()
    events = LoopEvents(cast(ReceiverEvents, role))
    indices = [1, 2]

    def transport() -> None:
        events.landed(KEY, 3, indices)
        indices.clear()  # it may reuse its list
        events.refused_write(KEY, "why")
        events.revoked(KEY)
        events.writer_gone("w-1")

    await asyncio.to_thread(transport)
    await until(lambda: len(role.heard) == 4)
    assert role.heard == [
        ("landed", KEY, 3, (1, 2)),
        ("refused_write", KEY, "why"),
        ("revoked", KEY),
        ("writer_gone", "w-1"),
    ]
    assert role.threads == {threading.get_ident()}


def test_a_closed_loop_hears_nothing() -> None:
    async def make() -> LoopEvents:
        return LoopEvents(cast(ReceiverEvents, Recorder()))

    events = asyncio.run(make())
    events.revoked(KEY)
