"""What a client is written: in order, one event at a time, merged only while a write is under way; and its bytes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.errors import Internal, ResourceExhausted
from baton.spec import FinishReason, Objectives, TokenLogprobs
from baton.v1 import generation_pb2 as gen
from router.clients.events import tokens
from router.requests.stream import ClientStream, Piece
from router.requests.timeline import Marks, Outcome, Path

OUTCOME = Outcome(
    FinishReason.LENGTH, "", 1, 1, Marks(0.0), None, None, 1.0, 1, 1, "p", "d", Path.DISAGGREGATED, Objectives()
)


class Wire:
    """Where pieces are written to: each write takes until the test lets it end."""

    def __init__(self) -> None:
        self.sent: list[Piece] = []
        self.waiting: list[asyncio.Future[None]] = []

    async def send(self, piece: Piece) -> None:
        self.sent.append(piece)
        self.waiting.append(asyncio.get_running_loop().create_future())
        await self.waiting[-1]

    async def done(self, end: Callable[[asyncio.Future[None]], None] = lambda future: future.set_result(None)) -> None:
        end(self.waiting[-1])
        await asyncio.sleep(0)


def piece(position: int, count: int = 1) -> Piece:
    return Piece(position, list(range(position, position + count)), "x" * count)


@pytest.fixture
def wire() -> Wire:
    return Wire()


async def test_each_piece_is_a_write_and_what_comes_meanwhile_is_one(wire: Wire) -> None:
    stream = ClientStream(8)
    stream.push(piece(0))
    assert stream.buffered_tokens == 1, "nobody takes it yet"
    delivery = asyncio.create_task(stream.deliver(wire.send))
    await asyncio.sleep(0)
    await wire.done()
    stream.push(piece(1))
    assert wire.sent[-1] == piece(1), "started by whoever pushed"
    stream.push(piece(2))
    stream.push(piece(3, 2))
    await wire.done()
    assert wire.sent == [piece(0), piece(1), piece(2, 3)]
    stream.push(piece(5))
    stream.finish(OUTCOME)
    await wire.done()
    assert not delivery.done(), "the end is behind the tokens"
    await wire.done()
    assert await delivery is OUTCOME
    assert wire.sent[-1] == piece(5)


async def test_a_bad_end_is_behind_the_tokens_too(wire: Wire) -> None:
    stream = ClientStream(8)
    delivery = asyncio.create_task(stream.deliver(wire.send))
    await asyncio.sleep(0)
    stream.push(piece(0))
    stream.fail(Internal("broken"))
    await asyncio.sleep(0)
    assert not delivery.done()
    await wire.done()
    with pytest.raises(Internal, match="broken"):
        await delivery


async def test_a_client_that_does_not_read_is_given_up_at_the_limit(wire: Wire) -> None:
    stream = ClientStream(2)
    delivery = asyncio.create_task(stream.deliver(wire.send))
    await asyncio.sleep(0)
    for position in range(3):
        stream.push(piece(position))
    with pytest.raises(ResourceExhausted, match="has not read for 3 tokens"):
        stream.push(piece(3))
    interrupted = asyncio.Event()
    stream.interrupt = interrupted.set
    stream.cut(Internal("cut off"))
    assert interrupted.is_set()
    assert stream.buffered_tokens == 0
    assert isinstance(stream.error, Internal)
    delivery.cancel()
    await asyncio.gather(delivery, return_exceptions=True)
    stream.push(piece(9))
    await wire.done()
    assert len(wire.sent) == 1, "nothing is written after the handler has left"


async def test_the_limit_holds_before_the_first_event_is_out_too() -> None:
    stream = ClientStream(2)
    stream.push(piece(0, 2))
    with pytest.raises(ResourceExhausted):
        stream.push(piece(2))


@pytest.mark.parametrize("end", [lambda f: f.set_exception(OSError("gone")), lambda f: f.cancel()])
async def test_a_write_that_fails_ends_the_delivery(wire: Wire, end: Callable[[asyncio.Future[None]], None]) -> None:
    stream = ClientStream(8)
    delivery = asyncio.create_task(stream.deliver(wire.send))
    await asyncio.sleep(0)
    stream.push(piece(0))
    await wire.done(end)
    with pytest.raises((OSError, asyncio.CancelledError)):
        await delivery


@given(
    st.integers(0, 2**32 - 1),
    st.lists(st.integers(0, 2**32 - 1), max_size=20),
    st.text(max_size=200),
    st.lists(st.floats(width=32, allow_nan=False), max_size=3),
)
def test_the_bytes_of_an_event_are_protobufs(position: int, ids: list[int], text: str, scores: list[float]) -> None:
    logprobs = [TokenLogprobs(score, ((3, score),)) for score in scores]
    read = gen.GenerateResponse.FromString(tokens(Piece(position, ids, text, logprobs)))
    assert read.WhichOneof("event") == "tokens"
    assert (read.tokens.position, list(read.tokens.ids), read.tokens.text) == (position, ids, text)
    assert [entry.logprob for entry in read.tokens.logprobs] == scores
    assert tokens(Piece(position, ids, text, logprobs)) == read.SerializeToString()
