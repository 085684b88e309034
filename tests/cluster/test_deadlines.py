"""Deadlines that make no sense, in a real cluster: from the SDK, and as a foreign client may write them on the wire."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from baton.errors import DeadlineExceeded, InvalidArgument
from baton.v1 import generation_pb2 as gen
from tests.cluster.conftest import Running, running, settled

pytestmark = pytest.mark.asyncio(loop_scope="module")
DATA, HEADERS, RESET, SETTINGS, END = 0, 1, 3, 4, 1


@pytest.fixture(scope="module")
def lines() -> list[str]:
    """What the processes log, from warnings on."""
    return []


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pair(lines: list[str]) -> AsyncIterator[Running]:
    async with running(engine="simulated", model="bytes", cost_model="instant", sink=lines.append) as started:
        yield started


async def is_well(pair: Running, lines: list[str]) -> None:
    """Nothing is left, and nothing raised."""
    await settled(pair)
    assert not lines
    for status in await pair.statuses():
        assert "commands_failed" not in status.counters
    done = await pair.client.complete(token_ids=[1, 2, 3], max_tokens=2, ignore_eos=True, timeout=10)
    assert len(done.token_ids) == 2


@pytest.mark.parametrize("timeout", [None, 604_801.0, 1e10, 1e300, math.inf])
async def test_more_than_a_week_is_no_hindrance(pair: Running, timeout: float | None) -> None:
    done = await pair.client.complete(token_ids=[1, 2, 3], max_tokens=3, ignore_eos=True, timeout=timeout)
    assert len(done.token_ids) == 3
    if timeout is not None:
        assert (await pair.client.tokenize("hi", timeout=timeout)).ids
        assert await pair.client.models(timeout=timeout)
        assert await pair.client.workers(timeout=timeout)
        assert await pair.client.health(timeout=timeout) == "serving"


@pytest.mark.parametrize("timeout", [1e-9, 1e-300])
async def test_next_to_nothing_is_kept_or_exceeded(pair: Running, lines: list[str], timeout: float) -> None:
    """gRPC rounds it up to a millisecond, in which a call may be answered."""
    with contextlib.suppress(DeadlineExceeded):
        await pair.client.complete(token_ids=[1, 2, 3], max_tokens=3, timeout=timeout)
    with contextlib.suppress(DeadlineExceeded):
        await pair.client.models(timeout=timeout)
    await is_well(pair, lines)


@pytest.mark.parametrize("timeout", [0, -1.0, math.nan, -math.inf])
async def test_what_is_no_time_is_refused_by_every_call(pair: Running, timeout: float) -> None:
    client = pair.client
    for call in (
        client.complete("hi", timeout=timeout),
        client.tokenize("hi", timeout=timeout),
        client.models(timeout=timeout),
        client.workers(timeout=timeout),
        client.status(timeout=timeout),
        client.explain("x", timeout=timeout),
        client.health(timeout=timeout),
    ):
        with pytest.raises(InvalidArgument, match=r"^timeout: must be positive") as caught:
            await call
        assert caught.value.field == "timeout"


@pytest.mark.parametrize(
    ("written", "served"), [("99999999H", True), ("99999999S", True), ("1n", False), ("0n", False)]
)
async def test_a_foreign_clients_deadline_is_taken_for_what_it_is(
    pair: Running, lines: list[str], written: str, served: bool
) -> None:
    request = gen.GenerateRequest(token_ids=gen.TokenIds(ids=[1, 2, 3]), stopping=gen.Stopping(max_tokens=3))
    async with asyncio.timeout(10):
        events = await generate(pair.cluster.address, request, written)
    kinds = [event.WhichOneof("event") for event in events]
    if served:
        assert {*kinds[:1], *kinds[-1:]} == {"accepted", "finished"}
    else:  # gRPC rounds it up to a millisecond, in which a call may get some of its answer
        assert "finished" not in kinds
    await is_well(pair, lines)


async def generate(address: str, request: gen.GenerateRequest, timeout: str) -> list[gen.GenerateResponse]:
    """The events of a call whose `grpc-timeout` is written as given, which no gRPC library does for us."""
    headers = {
        ":method": "POST", ":scheme": "http", ":path": "/baton.v1.Generation/Generate", ":authority": address,
        "content-type": "application/grpc", "te": "trailers", "grpc-timeout": timeout,
    }  # fmt: skip
    block = b"".join(b"\0%c%s%c%s" % (len(k), k.encode(), len(v), v.encode()) for k, v in headers.items())
    body = request.SerializeToString()
    reader, writer = await asyncio.open_connection(*address.rsplit(":", 1))
    try:
        writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + _frame(SETTINGS, 0, 0, b"") + _frame(SETTINGS, 1, 0, b""))
        writer.write(_frame(HEADERS, 4, 1, block) + _frame(DATA, END, 1, b"\0" + len(body).to_bytes(4, "big") + body))
        answer = b""
        while True:
            head = await reader.readexactly(9)
            kind, flags, stream = head[3], head[4], int.from_bytes(head[5:], "big")
            payload = await reader.readexactly(int.from_bytes(head[:3], "big"))
            if stream == 1 and kind == DATA:
                answer += payload
            if stream == 1 and (kind == RESET or flags & END):
                break
    finally:
        writer.close()
        await writer.wait_closed()
    events = []
    while answer:
        end = 5 + int.from_bytes(answer[1:5], "big")
        events.append(gen.GenerateResponse.FromString(answer[5:end]))
        answer = answer[end:]
    return events


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + payload
