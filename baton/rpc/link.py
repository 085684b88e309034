"""A multiplexed stream that survives its connection.

Between a router and a worker there is one stream for everything. Frames are numbered in each direction; a side keeps
what the other has not acknowledged and sends it again when the stream is taken up after a break. So a frame is
delivered exactly once and in order as long as both processes live and the break is shorter than the grace time.

    FRESH -> ATTACHED <-> DETACHED -> CLOSED        a session; who owns it closes it, closing is final

Two lanes leave a session: control first, then bulk. A large frame goes out in pieces on the bulk lane
(`baton.rpc.lanes`), so that a cancel waits for at most one piece and never for a prompt.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Generic, TypeVar

from baton.errors import ResourceExhausted, TransferError
from baton.rpc.lanes import Assembler, Lanes
from baton.v1 import worker_pb2 as wire

HEARTBEAT_S = 1.0
SILENCE_S = 5.0
"""A peer that said nothing for this long (five heartbeats) is taken for stalled, and the stream is broken off."""
GRACE_S = 3.0
"""How long a session outlives its stream."""
ACK_EVERY = 64
UNACKNOWLEDGED_LIMIT = 20_000
"""Frames kept for a peer that does not acknowledge; past it the session is given up rather than the memory."""

Out = TypeVar("Out", wire.RouterFrame, wire.WorkerFrame)
In = TypeVar("In", wire.RouterFrame, wire.WorkerFrame)


class Session(Generic[Out, In]):
    """One side's memory of a stream. Lives on one event loop; `on_frame` is called there for each new frame."""

    def __init__(self, out_type: type[Out], in_type: type[In], name: str, on_frame: Callable[[In], None]) -> None:
        self.name = name
        self.received = 0
        self.closed = False
        self._out_type: type[Out] = out_type
        self._in_type: type[In] = in_type
        self._on_frame: Callable[[In], None] = on_frame
        self._lanes: Lanes[Out] = Lanes(out_type)
        self._unacknowledged: deque[Out] = deque()
        self._resend: deque[Out] = deque()
        self._next_number = 1
        self._acknowledged_to_peer = 0
        self._epoch = 0
        self._assembler: Assembler[In] = Assembler(in_type)

    @property
    def pending(self) -> int:
        """Frames that the peer may not have seen."""
        return len(self._lanes) + len(self._unacknowledged)

    def send(self, frame: Out) -> None:
        """Queues a frame with its body set. After `close` frames are dropped: nobody is there to read them."""
        if self.closed:
            return
        if self.pending >= UNACKNOWLEDGED_LIMIT:
            raise ResourceExhausted(f"stream {self.name}: {self.pending} frames are not acknowledged")
        self._lanes.put(frame)

    def receive(self, frame: In) -> None:
        """Takes a frame from the wire: acknowledges ours, drops duplicates, assembles pieces, delivers the rest.

        Raises TransferError on a gap: the stream has to be broken off and taken up again. Raises ResourceExhausted
        when pieces exceed their limit, InvalidArgument when they make no frame: the session has to be given
        up. A closed session drops everything.
        """
        if self.closed:
            return
        while self._unacknowledged and self._unacknowledged[0].number <= frame.acknowledged:
            self._unacknowledged.popleft()
        if frame.number == 0 or frame.number <= self.received:
            return
        if frame.number != self.received + 1:
            raise TransferError(f"stream {self.name}: frame {frame.number} came after {self.received}")
        self.received = frame.number
        if self.received - self._acknowledged_to_peer >= ACK_EVERY:
            self._lanes.wake()
        if frame.WhichOneof("body") == "fragment":
            whole = self._assembler.add(frame.fragment)
            if whole is not None:
                self._on_frame(whole)
        else:
            self._on_frame(frame)

    def attach(self, received_by_peer: int) -> int:
        """A (new) stream starts: what the peer has not received goes out again, ahead of everything else. Returns the
        stream's number in this session; an older one is replaced."""
        while self._unacknowledged and self._unacknowledged[0].number <= received_by_peer:
            self._unacknowledged.popleft()
        self._resend = deque(self._unacknowledged)
        self._epoch += 1
        self._lanes.wake()
        return self._epoch

    def detach(self, stream: int | None = None) -> None:
        """The stream broke: `outgoing` ends; the session waits to be attached again or closed. Nothing happens when
        `stream` has been replaced already."""
        if stream is None or stream == self._epoch:
            self._epoch += 1
            self._lanes.wake()

    def close(self) -> None:
        """Nothing more is sent or kept. Idempotent."""
        self.closed = True
        self._lanes.clear()
        self._unacknowledged.clear()
        self._resend.clear()
        self._lanes.wake()

    async def outgoing(self, stream: int | None = None) -> AsyncIterator[Out]:
        """Frames to write to `stream` (the current one), heartbeats among them, until it is detached, replaced or
        closed."""
        epoch = self._epoch if stream is None else stream
        while not self.closed and epoch == self._epoch:
            frame = self._take()
            if frame is not None:
                yield frame
                continue
            woken = await self._lanes.wait(HEARTBEAT_S)
            if not woken or self.received - self._acknowledged_to_peer >= ACK_EVERY:
                yield self.heartbeat()

    def _take(self) -> Out | None:
        if self._resend:
            frame = self._resend.popleft()
        elif (queued := self._lanes.take()) is not None:
            frame = queued
            frame.number = self._next_number
            self._next_number += 1
            self._unacknowledged.append(frame)
        else:
            return None
        frame.acknowledged = self._acknowledged_to_peer = self.received
        return frame

    def heartbeat(self) -> Out:
        """Says no more than that this side lives, and what it has received."""
        self._acknowledged_to_peer = self.received
        return self._out_type(acknowledged=self.received, heartbeat=wire.Heartbeat())


def _nothing() -> None: ...


async def read_frames(
    session: Session[Out, In], source: AsyncIterator[In], on_first: Callable[[], None] = _nothing
) -> None:
    """Feeds a stream into its session until it ends; raises TimeoutError when the peer falls silent. `on_first` is
    called when something has come."""
    while True:
        async with asyncio.timeout(SILENCE_S):
            try:
                frame = await anext(source)
            except StopAsyncIteration:
                return
        on_first()
        on_first = _nothing
        session.receive(frame)
