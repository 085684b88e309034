"""What many streams of one connection get at once takes few packets."""

from __future__ import annotations

import asyncio
import socket
from collections import Counter

import pytest

from baton.v1 import generation_pb2 as gen
from baton.v1 import worker_pb2 as wire
from tests.router.conftest import Cluster, ids_of
from tests.router.doubles import encode
from tests.rpc.segments import segments_sent

STREAMS = 32
pytestmark = pytest.mark.skipif(not hasattr(socket, "TCP_CORK"), reason="no corks here")


async def test_the_tokens_of_a_frame_leave_in_few_packets(cluster: Cluster) -> None:
    gate, corks, read = cluster.decode.gate("step 1"), cluster.router.corks, Counter[int]()

    async def all_of(index: int) -> list[gen.GenerateResponse]:
        events = []
        async for event in cluster.call():
            events.append(event)
            read[index] += len(event.tokens.ids)
        return events

    calls = [asyncio.create_task(all_of(index)) for index in range(STREAMS)]
    await cluster.until(lambda: len(cluster.decode.attempts) == STREAMS and corks.found == 1)
    await cluster.until(lambda: [*read.values()] == [1] * STREAMS)
    (connection,) = corks._connections.values()
    assert connection.socket is not None
    before, second = segments_sent(connection.socket), len(encode("hello world")) + 1
    runs = [
        wire.TokenRun(attempt=attempt, position=second, ids=cluster.answer[1:2]) for attempt in cluster.decode.attempts
    ]
    cluster.decode.says(tokens=wire.TokenFrame(runs=runs))
    await cluster.until(lambda: [*read.values()] == [2] * STREAMS)
    assert segments_sent(connection.socket) - before < STREAMS / 2
    gate.set()
    for events in await asyncio.gather(*calls):
        assert ids_of(events) == cluster.answer
    await cluster.idle()
    assert len(corks) == 0
