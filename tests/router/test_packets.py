"""What many streams of one connection get at once takes few packets."""

from __future__ import annotations

import asyncio
import socket

import pytest

from baton.v1 import worker_pb2 as wire
from tests.router.conftest import Cluster, ids_of
from tests.router.doubles import encode
from tests.rpc.segments import segments_sent

STREAMS = 32
pytestmark = pytest.mark.skipif(not hasattr(socket, "TCP_CORK"), reason="no corks here")


async def test_the_tokens_of_a_frame_leave_in_few_packets(cluster: Cluster) -> None:
    gate, corks = cluster.decode.gate("step 1"), cluster.router.corks
    calls = [asyncio.create_task(cluster.generate()) for _ in range(STREAMS)]
    await cluster.until(lambda: len(cluster.decode.attempts) == STREAMS and corks.found == 1)
    await asyncio.sleep(0.1)  # all first tokens are out
    (connection,) = corks._connections.values()
    sending = connection.socket
    assert sending is not None
    before = segments_sent(sending)
    second = len(encode("hello world")) + 1
    runs = [
        wire.TokenRun(attempt=attempt, position=second, ids=cluster.answer[1:2]) for attempt in cluster.decode.attempts
    ]
    cluster.decode.says(tokens=wire.TokenFrame(runs=runs))
    await cluster.until(lambda: segments_sent(sending) > before)
    await asyncio.sleep(0.1)
    assert segments_sent(sending) - before < STREAMS / 2
    gate.set()
    for events in await asyncio.gather(*calls):
        assert ids_of(events) == cluster.answer
    await cluster.idle()
    assert len(corks) == 0
