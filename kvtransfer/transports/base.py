"""The seam between the handoff and the transports that move its bytes.

A `Receiver` admits tickets and reports through its `ReceiverEvents`. A `Writer` connects to a receiver's endpoint and
writes through the `Channel`. There is one class of each for every kind; a process makes those that its roles need. An
object that both of a kind share is made, and closed, by their caller. Deadlines are absolute, in `time.monotonic()`
seconds.

When the decode worker gives a grant up it calls `revoke`, and keeps the blocks in quarantine until there is proof:

| kind   | proof                                                                                          |
|--------|------------------------------------------------------------------------------------------------|
| memory | `revoked`: no write of the double is copying into the grant any more                           |
| shm    | the writer's Closed on the control stream (`revoke_proves` is False), or `writer_gone`         |
| tcp    | `revoked`: the ticket is gone, and what still comes of a batch is dropped                      |
| nccl   | `revoked`: no receive of the grant is posted, or its communicator is aborted and drained       |
| nixl   | `revoked`: the ticket is gone, and no batch of it is under way or its pair's agent is closed   |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from baton.model import KvLayout
from baton.spec import HandoffKey, ProcessRef
from kvtransfer.handoffs.messages import BlockMove, Ticket


class BlockMemory(Protocol):
    """A pool: `blocks` blocks of `layout`, back to back from `address`, in the memory that the transport moves."""

    @property
    def layout(self) -> KvLayout: ...
    @property
    def blocks(self) -> int: ...
    @property
    def address(self) -> int: ...


@dataclass(frozen=True, slots=True)
class WriteReceipt:
    """A write that is wholly in place. `seconds` is from the call to the receiver's acknowledgement."""

    bytes: int
    seconds: float


class ReceiverEvents(Protocol):
    """A receiver calls these from its own threads; none may block or raise. A worker passes each on to its loop with
    `call_soon_threadsafe`."""

    def landed(self, key: HandoffKey, generation: int, indices: Sequence[int]) -> None:
        """These blocks of an admitted ticket are in place, whole and checked."""

    def revoked(self, key: HandoffKey) -> None:
        """Proof: no more bytes of this handoff can arrive."""

    def writer_gone(self, incarnation: str) -> None:
        """Proof: this process has ended, and nothing of it can arrive through this receiver any more."""

    def refused_write(self, key: HandoffKey, why: str) -> None:
        """A write was refused, before any of it counted; for the log and the counters."""


class Receiver(Protocol):
    """Takes writes into one pool, which must outlive it. All methods may be called from any thread. `kind` is the
    name in the handshake, as `shm`."""

    @property
    def kind(self) -> str: ...
    @property
    def revoke_proves(self) -> bool:
        """Whether `revoke` is always followed by `revoked`. If not, the writer's Closed is the proof."""

    def endpoint(self) -> str:
        """The address that writers connect to."""

    def admit(self, ticket: Ticket) -> None:
        """Accept writes under this ticket from now on; called before the grant is sent. The newest of a key counts."""

    def revoke(self, key: HandoffKey) -> None:
        """Accept no more writes under this key. Does not block; `revoked` comes from another thread, also for a key
        that is not admitted. Called on every abort, and when the sequence is resident."""

    def close(self) -> None:
        """End all threads and connections and free every descriptor and mapping. Idempotent."""


class Channel(Protocol):
    """A connection to one receiver, for one thread at a time; `close` may come from any."""

    def write(self, ticket: Ticket, moves: Sequence[BlockMove], deadline: float) -> WriteReceipt:
        """Copy blocks, and return when the receiver has them in place and knows it.

        Blocks the calling thread, which must not be the loop's; releases the interpreter lock while bytes move. The
        source blocks must stay unchanged until it returns or raises; after that this call reads and sends nothing.
        Raises `WriteRefused` (token, generation or block; `WriteRevoked` where the grant is over or was given up; the
        channel stays good), `ChecksumMismatch` (nothing counted; may be written again), `PeerClosed` or
        `DeadlineExceeded` (the channel is broken: close it).
        """

    def close(self) -> None:
        """Free the channel's resources; a `write` under way ends with `PeerClosed`. Idempotent."""


class Writer(Protocol):
    """Writes from one pool, which must outlive it. All methods may be called from any thread."""

    @property
    def kind(self) -> str: ...

    def connect(self, endpoint: str, peer: ProcessRef, deadline: float) -> Channel:
        """A channel to the receiver `peer`, which the caller closes; blocks. Raises `PeerClosed`, `DeadlineExceeded`,
        or `Mismatch` where block sizes or options differ."""

    def close(self) -> None:
        """Free resources other than channels. Idempotent. Most kinds hold none, and inherit this."""
        return
