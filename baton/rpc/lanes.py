"""The frames that wait to be written to a stream: control first, then bulk.

A huge prompt must not delay a cancel. So a message above `FRAGMENT_BYTES` is cut into pieces that travel on the bulk
lane, each a frame of its own, and any small frame overtakes them.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any, Generic, TypeVar

from google.protobuf.message import DecodeError

from baton.errors import InvalidArgument, ResourceExhausted
from baton.v1 import transfer_pb2, worker_pb2

FRAGMENT_BYTES = 64 * 1024
ASSEMBLY_LIMIT_BYTES = 32 * 1024 * 1024

Frame = TypeVar("Frame", worker_pb2.RouterFrame, worker_pb2.WorkerFrame, transfer_pb2.SenderFrame)


class Lanes(Generic[Frame]):
    """A queue for one reader on one event loop."""

    def __init__(self, frame_type: type[Frame]) -> None:
        self._frame_type: Any = frame_type
        self._control: deque[Frame] = deque()
        self._bulk: deque[Frame] = deque()
        self._event = asyncio.Event()
        self._next_message = 1

    def __len__(self) -> int:
        return len(self._control) + len(self._bulk)

    def put(self, frame: Frame) -> None:
        """Queues a frame, in pieces when it is large."""
        if frame.ByteSize() > FRAGMENT_BYTES:
            self._bulk.extend(self._split(frame))
        else:
            self._control.append(frame)
        self._event.set()

    def take(self) -> Frame | None:
        if self._control:
            return self._control.popleft()
        return self._bulk.popleft() if self._bulk else None

    def wake(self) -> None:
        """Ends a `wait` without a frame."""
        self._event.set()

    async def wait(self, seconds: float) -> bool:
        """Waits for `put` or `wake`; False after `seconds`. Call it when `take` gave None."""
        try:
            async with asyncio.timeout(seconds):
                await self._event.wait()
        except TimeoutError:
            return False
        finally:
            self._event.clear()
        return True

    def clear(self) -> None:
        self._control.clear()
        self._bulk.clear()

    def _split(self, frame: Frame) -> list[Frame]:
        data, message_id = frame.SerializeToString(), self._next_message
        self._next_message += 1
        pieces = [data[start : start + FRAGMENT_BYTES] for start in range(0, len(data), FRAGMENT_BYTES)]
        fragments = [worker_pb2.Fragment(message_id=message_id, data=piece) for piece in pieces]
        fragments[-1].last = True
        return [self._frame_type(fragment=fragment) for fragment in fragments]


class Assembler(Generic[Frame]):
    """Puts pieces together again, within `ASSEMBLY_LIMIT_BYTES`."""

    def __init__(self, frame_type: type[Frame]) -> None:
        self._frame_type: Any = frame_type
        self._parts: dict[int, bytearray] = {}
        self._bytes = 0

    def add(self, fragment: worker_pb2.Fragment) -> Frame | None:
        """The whole frame when this was its last piece. Raises ResourceExhausted past the limit, and InvalidArgument
        where the pieces make no frame: a message is lost, and the caller must give the stream up."""
        self._parts.setdefault(fragment.message_id, bytearray()).extend(fragment.data)
        self._bytes += len(fragment.data)
        if self._bytes > ASSEMBLY_LIMIT_BYTES:
            raise ResourceExhausted(f"messages in pieces exceed {ASSEMBLY_LIMIT_BYTES} bytes")
        if not fragment.last:
            return None
        data = bytes(self._parts.pop(fragment.message_id))
        self._bytes -= len(data)
        frame: Frame = self._frame_type()
        try:
            frame.ParseFromString(data)
        except DecodeError:
            name = self._frame_type.DESCRIPTOR.name
            text = f"the {len(data)} bytes of message {fragment.message_id} are no {name}"
            raise InvalidArgument("fragment.data", text) from None
        return frame
