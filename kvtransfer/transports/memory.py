"""The double: a transport within one process that can delay, reorder between pairs, stall, tear and die.

It keeps the contract of the real ones, so that workers and state machines can be tested against every fault without a
socket. Each (writer, receiver) pair has its own `Faults`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from baton.errors import DeadlineExceeded, PeerClosed, WriteRefused, WriteRevoked
from baton.spec import HandoffKey, ProcessRef
from kvtransfer.blocks.memory import PoolMemory
from kvtransfer.handoffs.messages import BlockMove, Ticket
from kvtransfer.transports.base import ReceiverEvents
from kvtransfer.transports.channel import BlockChannel
from kvtransfer.transports.wire import OVER, REVOKED, Identity, agree, refusal


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
    """The doubles of one process. Thread-safe: single operations on a dictionary are atomic."""

    def __init__(self) -> None:
        self.receivers: dict[str, MemoryReceiver] = {}
        """By endpoint."""
        self._faults: dict[tuple[str, str], Faults] = {}

    def faults(self, writer: str, endpoint: str) -> Faults:
        """Of the pair: the writer's incarnation, the receiver's endpoint."""
        return self._faults.setdefault((writer, endpoint), Faults())

    def writer_died(self, incarnation: str) -> None:
        """Tells all receivers that this process has ended, as a pidfd would."""
        for receiver in list(self.receivers.values()):
            receiver.writer_died(incarnation)


class MemoryReceiver:
    """Implements `Receiver`. Callbacks come from the thread that caused them: the writer's, or the one that calls
    `revoke`."""

    kind = "memory"
    revoke_proves = True

    def __init__(self, memory: PoolMemory, events: ReceiverEvents, incarnation: str, network: MemoryNetwork) -> None:
        self.memory = memory
        self.events = events
        self._network = network
        self._endpoint = f"memory:{incarnation}"
        self._lock = threading.Lock()
        self._tickets: dict[HandoffKey, Ticket] = {}
        self._dead: set[str] = set()
        self.closed = False
        network.receivers[self._endpoint] = self

    def endpoint(self) -> str:
        return self._endpoint

    def admit(self, ticket: Ticket) -> None:
        with self._lock:
            self._tickets[ticket.key] = ticket

    def revoke(self, key: HandoffKey) -> None:
        with self._lock:  # each block is placed under this lock, so no writer is inside one now
            self._tickets.pop(key, None)
        self.events.revoked(key)

    def close(self) -> None:
        with self._lock:
            self.closed = True
        self._network.receivers.pop(self._endpoint, None)

    def check(self, ticket: Ticket, moves: Sequence[BlockMove], writer: str) -> str | None:
        identity = Identity(ticket.key, ticket.generation, ticket.write_token)
        with self._lock:
            return refusal(self._tickets.get(ticket.key), identity, ((m.index, m.destination) for m in moves), writer)

    def place(self, ticket: Ticket, move: BlockMove, data: memoryview, size: int) -> None:
        """The first `size` bytes of a block. Raises `WriteRevoked` when the ticket is no longer admitted."""
        with self._lock:
            if self.closed or ticket.writer in self._dead:
                raise PeerClosed("the process has ended")
            if self._tickets.get(ticket.key) != ticket:
                raise WriteRevoked(REVOKED)
            self.memory.block(move.destination)[:size] = data[:size]

    def landed(self, ticket: Ticket, moves: Sequence[BlockMove]) -> None:
        with self._lock:
            if self._tickets.get(ticket.key) != ticket:
                raise WriteRevoked(REVOKED)
        self.events.landed(ticket.key, ticket.generation, [move.index for move in moves])

    def writer_died(self, incarnation: str) -> None:
        with self._lock:
            first = incarnation not in self._dead
            self._dead.add(incarnation)
        if first:
            self.events.writer_gone(incarnation)


class MemoryWriter:
    """Implements `Writer`. To the receivers its close looks like the death of its process."""

    kind = "memory"

    def __init__(self, memory: PoolMemory, incarnation: str, network: MemoryNetwork) -> None:
        self.memory = memory
        self.incarnation = incarnation
        self._network = network
        self.closed = False

    def connect(self, endpoint: str, peer: ProcessRef, deadline: float) -> MemoryChannel:
        receiver = self._network.receivers.get(endpoint)
        if receiver is None:
            raise PeerClosed(f"{peer.name} does not listen at {endpoint}")
        agree(("block_bytes", self.memory.layout.block_bytes, receiver.memory.layout.block_bytes))
        return MemoryChannel(self, peer, receiver, self._network.faults(self.incarnation, endpoint))

    def close(self) -> None:
        self.closed = True
        self._network.writer_died(self.incarnation)


class MemoryChannel(BlockChannel):
    def __init__(self, writer: MemoryWriter, peer: ProcessRef, receiver: MemoryReceiver, faults: Faults) -> None:
        super().__init__(writer.memory, peer)
        self._writer = writer
        self._receiver = receiver
        self._faults = faults

    def _move(self, ticket: Ticket, moves: Sequence[BlockMove], deadline: float) -> None:
        try:
            if (why := self._receiver.check(ticket, moves, self._writer.incarnation)) is not None:
                raise WriteRevoked(why) if why in OVER else WriteRefused(why)
            for move in moves:
                self._wait(deadline)
                self._place(ticket, move)
            self._receiver.landed(ticket, moves)
        except WriteRefused as error:
            self._receiver.events.refused_write(ticket.key, str(error))
            raise

    def _interrupt(self) -> None:
        self._faults.flowing.set()

    def _free(self) -> None:
        pass

    def _place(self, ticket: Ticket, move: BlockMove) -> None:
        if self._closing or self._writer.closed or self._receiver.closed:
            raise PeerClosed("the channel is closed")
        data = self._writer.memory.block(move.source)
        left = self._faults.tear_after
        if left is not None and left <= 0:
            self._receiver.place(ticket, move, data, self._block_bytes // 2)
            raise PeerClosed("the connection broke in the middle of a block")
        self._receiver.place(ticket, move, data, self._block_bytes)
        if left is not None:
            self._faults.tear_after = left - 1

    def _wait(self, deadline: float) -> None:
        left = deadline - time.monotonic()
        if self._faults.delay_s:
            threading.Event().wait(min(max(left, 0.0), self._faults.delay_s))
            left = deadline - time.monotonic()
        if left <= 0 or not self._faults.flowing.wait(left):
            raise DeadlineExceeded("the write did not end in time")
