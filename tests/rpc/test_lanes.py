"""Large messages travel in pieces."""

from __future__ import annotations

from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.errors import InvalidArgument, ResourceExhausted
from baton.rpc import lanes
from baton.rpc.lanes import FRAGMENT_BYTES, Assembler, Lanes
from baton.v1 import transfer_pb2, worker_pb2


def prompt(tokens: int) -> transfer_pb2.SenderFrame:
    spec = worker_pb2.SequenceSpec(prompt_tokens=[70_000] * tokens)
    return transfer_pb2.SenderFrame(open=transfer_pb2.OpenRequest(attempt=b"a", spec=spec))


def pieces(frame: transfer_pb2.SenderFrame) -> list[transfer_pb2.SenderFrame]:
    queue: Lanes[transfer_pb2.SenderFrame] = Lanes(transfer_pb2.SenderFrame)
    queue.put(frame)
    return [piece for _ in range(len(queue)) if (piece := queue.take()) is not None]


@pytest.mark.parametrize("tokens", [1, 20_000, 22_000, 200_000])
def test_a_message_comes_out_as_it_went_in(tokens: int) -> None:
    frame = prompt(tokens)
    found = pieces(frame)
    if frame.ByteSize() <= FRAGMENT_BYTES:
        assert found == [frame]
        return
    assert all(len(piece.fragment.data) <= FRAGMENT_BYTES for piece in found)
    assembler = Assembler(transfer_pb2.SenderFrame)
    results = [assembler.add(piece.fragment) for piece in found]
    assert results[:-1] == [None] * (len(found) - 1)
    assert results[-1] == frame


@given(st.data())
def test_pieces_of_several_messages_may_interleave(data: st.DataObject) -> None:
    queue: Lanes[transfer_pb2.SenderFrame] = Lanes(transfer_pb2.SenderFrame)
    messages = [prompt(25 + 20 * number) for number in range(3)]
    streams = []
    with mock.patch("baton.rpc.lanes.FRAGMENT_BYTES", 64):
        for message in messages:
            queue.put(message)
            streams.append([piece for _ in range(len(queue)) if (piece := queue.take()) is not None])
    assembler = Assembler(transfer_pb2.SenderFrame)
    whole = []
    while any(streams):
        stream = data.draw(st.sampled_from([stream for stream in streams if stream]))
        if (frame := assembler.add(stream.pop(0).fragment)) is not None:
            whole.append(frame)
    assert sorted(frame.ByteSize() for frame in whole) == sorted(frame.ByteSize() for frame in messages)
    assert all(frame in messages for frame in whole)


def test_the_pieces_at_hand_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes, "ASSEMBLY_LIMIT_BYTES", 1000)
    assembler = Assembler(worker_pb2.RouterFrame)
    for number in range(10):
        assembler.add(worker_pb2.Fragment(message_id=number, data=b"x" * 100))
    with pytest.raises(ResourceExhausted, match="exceed 1000 bytes"):
        assembler.add(worker_pb2.Fragment(message_id=3, data=b"x"))


@pytest.mark.parametrize("data", [b"\xff" * 10, b"\x0a\x7fcut off"])
def test_pieces_that_make_no_frame_are_refused(data: bytes) -> None:
    assembler = Assembler(worker_pb2.RouterFrame)
    assembler.add(worker_pb2.Fragment(message_id=7, data=data[:2]))
    with pytest.raises(InvalidArgument, match="message 7 are no RouterFrame") as caught:
        assembler.add(worker_pb2.Fragment(message_id=7, data=data[2:], last=True))
    assert caught.value.field == "fragment.data"


def test_finished_messages_do_not_count_against_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes, "ASSEMBLY_LIMIT_BYTES", 1000)
    data = worker_pb2.RouterFrame(cancel=worker_pb2.CancelCommand(reason="x" * 500)).SerializeToString()
    assembler = Assembler(worker_pb2.RouterFrame)
    for number in range(20):
        assert assembler.add(worker_pb2.Fragment(message_id=number, data=data, last=True)) is not None


async def test_waiting_ends_with_a_frame_a_wake_or_in_time() -> None:
    queue: Lanes[worker_pb2.RouterFrame] = Lanes(worker_pb2.RouterFrame)
    assert not await queue.wait(0.01)
    queue.wake()
    assert await queue.wait(10)
    queue.put(worker_pb2.RouterFrame(cancel=worker_pb2.CancelCommand()))
    assert await queue.wait(10)
    assert len(queue) == 1
    queue.clear()
    assert queue.take() is None
