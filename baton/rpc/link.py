"""A multiplexed stream that survives its connection.

A router and a worker have one stream for everything. Frames are numbered in each direction; a side keeps those that the
other has not acknowledged, and sends them again after a break. So each frame arrives exactly once and in order, as long
as both processes live and the break is shorter than the grace time.

    FRESH -> ATTACHED <-> DETACHED -> CLOSED        a session; its owner closes it, for good

Frames leave by `baton.rpc.lanes`, so that a cancel waits for at most one piece of a prompt.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Generic, TypeVar

from baton.errors import ResourceExhausted, TransferError
from baton.rpc.awake import patience
from baton.rpc.lanes import Assembler, Lanes
from baton.v1 import worker_pb2 as wire

HEARTBEAT_S = 1.0
SILENCE_S = 5.0
"""A peer that says nothing for so long (five heartbeats) is silent."""
BUSY_HEARTBEAT_S = 0.25
"""Between two heartbeats of a worker with sequences."""
GRACE_S = 3.0
"""How long a session outlives its stream."""
ACK_EVERY = 64
UNACKNOWLEDGED_LIMIT = 20_000
"""A session with more unacknowledged frames is given up, to bound memory."""

Out = TypeVar("Out", wire.RouterFrame, wire.WorkerFrame)
In = TypeVar("In", wire.RouterFrame, wire.WorkerFrame)


class Session(Generic[Out, In]):
    """One side's memory of a stream. Lives on one event loop, where it calls `on_frame` for each new frame."""

    def __init__(self, out_type: type[Out], in_type: type[In], name: str, on_frame: Callable[[In], None]) -> None:
        self.name, self.received, self.closed = name, 0, False
        self._out_type: type[Out] = out_type
        self._on_frame: Callable[[In], None] = on_frame
        self._lanes: Lanes[Out] = Lanes(out_type)
        self._unacknowledged: deque[Out] = deque()
        self._resend: deque[Out] = deque()
        self._next_number, self._acknowledged_to_peer, self._epoch = 1, 0, 0
        self._assembler: Assembler[In] = Assembler(in_type)
        self.pulse: Callable[[], wire.Heartbeat | None] = lambda: None
        """What heartbeats say; None, and they are rarer, where there is nothing to say."""

    @property
    def pending(self) -> int:
        """Frames that the peer may not have seen."""
        return len(self._lanes) + len(self._unacknowledged)

    def send(self, frame: Out) -> None:
        """Queues a frame with its body set; drops it after `close`. Raises ResourceExhausted past the limit."""
        if self.closed:
            return
        if self.pending >= UNACKNOWLEDGED_LIMIT:
            raise ResourceExhausted(f"stream {self.name}: {self.pending} frames are not acknowledged")
        self._lanes.put(frame)

    def receive(self, frame: In) -> None:
        """Takes a frame from the wire; drops it when closed. Raises TransferError on a gap: the stream must be broken
        off and taken up again. Raises ResourceExhausted or InvalidArgument where pieces exceed their limit or make no
        frame: the session must be given up."""
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
        """A new stream replaces any older one; frames that the peer has not received go out first. Returns the stream's
        number in this session."""
        while self._unacknowledged and self._unacknowledged[0].number <= received_by_peer:
            self._unacknowledged.popleft()
        self._resend = deque(self._unacknowledged)
        self._epoch += 1
        self._lanes.wake()
        return self._epoch

    def detach(self, stream: int | None = None) -> None:
        """The stream broke: `outgoing` ends. Does nothing when a newer stream has replaced `stream`."""
        if stream is None or stream == self._epoch:
            self._epoch += 1
            self._lanes.wake()

    def close(self) -> None:
        """Sends and keeps nothing more. Idempotent."""
        self.closed = True
        self._lanes.clear()
        self._unacknowledged.clear()
        self._resend.clear()
        self._lanes.wake()

    async def outgoing(self, stream: int | None = None) -> AsyncIterator[Out]:
        """Frames to write to `stream` (the current one), with heartbeats, until it is detached, replaced or closed."""
        epoch = self._epoch if stream is None else stream
        while not self.closed and epoch == self._epoch:
            frame = self._take()
            if frame is not None:
                yield frame
                continue
            woken = await self._lanes.wait(HEARTBEAT_S if self.pulse() is None else BUSY_HEARTBEAT_S)
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
        self._acknowledged_to_peer = self.received
        return self._out_type(acknowledged=self.received, heartbeat=self.pulse() or wire.Heartbeat())


async def read_frames(
    session: Session[Out, In], source: AsyncIterator[In], patience_s: float, heard: Callable[[In], None]
) -> None:
    """Feeds a stream into its session until it ends; `heard` is called with each frame first. Raises TimeoutError when
    the peer is silent for `patience_s`."""
    async with patience(patience_s) as limit:
        async for frame in source:
            limit.restart()
            heard(frame)
            session.receive(frame)
