"""The double: a transport within one process that can delay, reorder between pairs, stall, tear and die.

It keeps the contract of the real ones, so that workers and state machines can be tested against every fault without a
socket. Each (writer, receiver) pair has its own `Faults`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from baton.errors import DeadlineExceeded, Mismatch, PeerClosed, TransferError, WriteRefused
from baton.spec import HandoffKey, ProcessRef
from kvtransfer.blocks.memory import PoolMemory
from kvtransfer.handoffs.messages import Ticket
from kvtransfer.transports.base import BlockMove, ReceiverEvents, WriteReceipt
from kvtransfer.transports.check import plan, refusal


@dataclass(slots=True)
class Faults:
    """How one pair misbehaves. May be changed at any time, also while a write is under way.

    `delay_s`: before each block. Pairs with different delays overtake each other: that is how writes are reordered.
    `flowing`: cleared, the pair stalls before its next block. `tear_after`: blocks until the connection breaks, in the
    middle of one.
    """

    delay_s: float = 0.0
    flowing: threading.Event = field(default_factory=threading.Event)
    tear_after: int | None = None

    def __post_init__(self) -> None:
        self.flowing.set()


class MemoryNetwork:
    """Where doubles find each other. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._receivers: dict[str, MemoryTransport] = {}
        self._faults: dict[tuple[str, str], Faults] = {}

    def faults(self, writer: str, endpoint: str) -> Faults:
        """The switchboard of the pair: the writer's incarnation, the receiver's endpoint."""
        with self._lock:
            return self._faults.setdefault((writer, endpoint), Faults())

    def listen(self, endpoint: str, receiver: MemoryTransport) -> None:
        with self._lock:
            self._receivers[endpoint] = receiver

    def leave(self, endpoint: str) -> None:
        with self._lock:
            self._receivers.pop(endpoint, None)

    def receiver(self, endpoint: str) -> MemoryTransport | None:
        with self._lock:
            return self._receivers.get(endpoint)

    def writer_died(self, incarnation: str) -> None:
        """Tell all receivers that this process has ended, as a pidfd would."""
        with self._lock:
            receivers = list(self._receivers.values())
        for receiver in receivers:
            receiver.writer_died(incarnation)


class MemoryTransport:
    """Implements `Transport`. Callbacks come from the thread that caused them: the writer's, or the one that calls
    `revoke`."""

    kind = "memory"
    revoke_proves = True

    def __init__(
        self, memory: PoolMemory, incarnation: str, network: MemoryNetwork, events: ReceiverEvents | None = None
    ) -> None:
        self.memory = memory
        self.incarnation = incarnation
        self.network = network
        self.events = events
        self._lock = threading.Lock()
        self._tickets: dict[HandoffKey, Ticket] = {}
        self._dead: set[str] = set()
        self._closed = False
        if events is not None:
            network.listen(self.endpoint(), self)

    def endpoint(self) -> str:
        assert self.events is not None, "only a receiver has an endpoint"
        return f"memory:{self.incarnation}"

    def connect(self, endpoint: str, peer: ProcessRef, deadline: float) -> MemoryChannel:
        receiver = self.network.receiver(endpoint)
        if receiver is None:
            raise PeerClosed(f"nobody listens at {endpoint} for {peer.name}")
        ours, theirs = self.memory.layout.block_bytes, receiver.memory.layout.block_bytes
        if ours != theirs:
            raise Mismatch("block_bytes", str(ours), str(theirs))
        return MemoryChannel(self, receiver, self.network.faults(self.incarnation, endpoint))

    def admit(self, ticket: Ticket) -> None:
        with self._lock:
            self._tickets[ticket.key] = ticket

    def revoke(self, key: HandoffKey) -> None:
        with self._lock:  # each block is placed under this lock, so nobody is inside one now
            self._tickets.pop(key, None)
        if self.events is not None:
            self.events.revoked(key)

    def close(self) -> None:
        """To the others it looks like the death of this process."""
        with self._lock:
            first, self._closed = not self._closed, True
        if first:
            if self.events is not None:
                self.network.leave(self.endpoint())
            self.network.writer_died(self.incarnation)

    @property
    def closed(self) -> bool:
        return self._closed

    def check(self, ticket: Ticket, moves: Sequence[BlockMove], writer: str) -> str | None:
        with self._lock:
            return refusal(self._tickets.get(ticket.key), ticket, moves, writer)

    def place(self, ticket: Ticket, move: BlockMove, data: memoryview, size: int) -> None:
        """The first `size` bytes of a block. Raises `WriteRefused` when the ticket is no longer admitted."""
        with self._lock:
            if self._closed or ticket.writer in self._dead:
                raise PeerClosed("the process has ended")
            if self._tickets.get(ticket.key) != ticket:
                raise WriteRefused(f"{ticket.key} was revoked")
            self.memory.block(move.destination)[:size] = data[:size]

    def landed(self, ticket: Ticket, moves: Sequence[BlockMove]) -> None:
        with self._lock:
            if self._tickets.get(ticket.key) != ticket:
                raise WriteRefused(f"{ticket.key} was revoked")
        assert self.events is not None
        self.events.landed(ticket.key, ticket.generation, [move.index for move in moves])

    def writer_died(self, incarnation: str) -> None:
        with self._lock:
            first = incarnation not in self._dead
            self._dead.add(incarnation)
        if first and self.events is not None:
            self.events.writer_gone(incarnation)


class MemoryChannel:
    """Implements `Channel`."""

    def __init__(self, writer: MemoryTransport, receiver: MemoryTransport, faults: Faults) -> None:
        self._writer = writer
        self._receiver = receiver
        self._faults = faults
        self._broken = False

    def write(self, ticket: Ticket, moves: Sequence[BlockMove], deadline: float) -> WriteReceipt:
        started = time.monotonic()
        plan(ticket, moves, self._writer.memory.blocks)
        if (why := self._receiver.check(ticket, moves, self._writer.incarnation)) is not None:
            self._refused(ticket, why)
        size = self._writer.memory.layout.block_bytes
        try:
            for move in moves:
                self._wait(deadline)
                self._place(ticket, move, size)
            self._receiver.landed(ticket, moves)
        except WriteRefused as error:
            self._refused(ticket, str(error))
        except TransferError:
            self._broken = True
            raise
        return WriteReceipt(len(moves) * size, time.monotonic() - started)

    def close(self) -> None:
        self._broken = True
        self._faults.flowing.set()

    def _place(self, ticket: Ticket, move: BlockMove, size: int) -> None:
        if self._broken or self._writer.closed or self._receiver.closed:
            raise PeerClosed("the channel is closed")
        data = self._writer.memory.block(move.source)
        left = self._faults.tear_after
        if left is not None and left <= 0:
            self._receiver.place(ticket, move, data, size // 2)
            raise PeerClosed("the connection broke in the middle of a block")
        self._receiver.place(ticket, move, data, size)
        if left is not None:
            self._faults.tear_after = left - 1

    def _wait(self, deadline: float) -> None:
        left = deadline - time.monotonic()
        if self._faults.delay_s:
            threading.Event().wait(min(max(left, 0.0), self._faults.delay_s))
            left = deadline - time.monotonic()
        if left <= 0 or not self._faults.flowing.wait(left):
            self._broken = True
            raise DeadlineExceeded("the write did not end in time")

    def _refused(self, ticket: Ticket, why: str) -> None:
        assert self._receiver.events is not None
        self._receiver.events.refused_write(ticket.key, why)
        raise WriteRefused(why)
