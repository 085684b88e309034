"""The seam between the handoff and what moves the bytes.

One `Transport` for each kind and process owns its threads, sockets and mappings; both roles use the same class. The
receiver's side admits tickets and reports through `ReceiverEvents`. The writer's side connects to a receiver's
endpoint and writes through the `Channel`. Deadlines are absolute, in `time.monotonic()` seconds.

When the receiver gives a grant up it calls `revoke`, and keeps the blocks in quarantine until there is proof:

| kind   | proof                                                                                          |
|--------|------------------------------------------------------------------------------------------------|
| memory | `revoked`: no write of the double is copying into the grant any more                           |
| shm    | the writer's Closed on the control stream (`revoke_proves` is False), or `writer_gone`         |
| tcp    | `revoked`: the ticket is gone, and no reader is inside one of its blocks or its socket closed  |
| nccl   | `revoked`: the communicator's abort returned and the stream is drained                         |
| nixl   | Closed or `writer_gone`, or `revoked` once the memory registration is withdrawn                |

How the others fit. NCCL has no one-sided write: a channel's `write` first announces the batch (ticket and indices) to
the receiver over the channel's own control connection; the receiver checks it against the admitted tickets, both sides
post the group call on the device's one issuing thread, and `landed` follows the receiver's event. A fence that orders
the send after the kernels that fill the blocks belongs to the batch: the transport takes it where `write` begins.
NIXL writes one-sidedly: the endpoint carries the agent's metadata, and the transfer's notification carries key,
generation, token and indices, which the receiver's progress thread checks before it calls `landed`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from baton.spec import HandoffKey, ProcessRef
from kvtransfer.handoffs.messages import Ticket


@dataclass(frozen=True, slots=True)
class BlockMove:
    """One block to write: `source` in the writer's pool, `destination` in the receiver's, `index` in the sequence."""

    source: int
    destination: int
    index: int


@dataclass(frozen=True, slots=True)
class WriteReceipt:
    """A write that is wholly in place. `seconds` is from the call to the receiver's acknowledgement."""

    bytes: int
    seconds: float


class ReceiverEvents(Protocol):
    """What a receiver's transport reports, from its own threads; must not block or raise. A worker passes each on to
    its loop with `call_soon_threadsafe`."""

    def landed(self, key: HandoffKey, generation: int, indices: Sequence[int]) -> None:
        """These blocks of an admitted ticket are in place, whole and checked."""

    def revoked(self, key: HandoffKey) -> None:
        """Proof: no more bytes of this handoff can arrive."""

    def writer_gone(self, incarnation: str) -> None:
        """Proof: this process has ended, and nothing of it can arrive through this transport any more."""

    def refused_write(self, key: HandoffKey, why: str) -> None:
        """A write was refused, before any of it counted; for the log and the counters."""


class Channel(Protocol):
    """The writer's way into one receiver. One thread at a time uses it; `close` may come from any."""

    def write(self, ticket: Ticket, moves: Sequence[BlockMove], deadline: float) -> WriteReceipt:
        """Copy blocks, and return when the receiver has them in place and knows it.

        Blocks the calling thread, which must not be the loop's; releases the interpreter lock while bytes move. The
        source blocks must stay unchanged until it returns or raises; after that this call reads and sends nothing.
        Raises `WriteRefused` (token, generation or block; the channel stays good), `ChecksumMismatch` (nothing
        counted; may be written again), `PeerClosed` or `DeadlineExceeded` (the channel is broken: close it).
        """

    def close(self) -> None:
        """Free what the channel holds; a `write` under way ends with `PeerClosed`. Idempotent."""


class Transport(Protocol):
    """One kind of transport in one process. All methods may be called from any thread."""

    @property
    def kind(self) -> str:
        """As in the handshake: `shm`, `tcp`."""

    @property
    def revoke_proves(self) -> bool:
        """Whether `revoke` is always followed by `revoked`. If not, the writer's Closed is the proof."""

    def endpoint(self) -> str:
        """Where a writer connects to this receiver. Only with `ReceiverEvents`."""

    def connect(self, endpoint: str, peer: ProcessRef, deadline: float) -> Channel:
        """A channel to the receiver `peer`; blocks. Raises `PeerClosed`, `DeadlineExceeded`, or `Mismatch` where
        block sizes or options differ."""

    def admit(self, ticket: Ticket) -> None:
        """Accept writes under this ticket from now on; called before the grant is sent. The newest of a key counts."""

    def revoke(self, key: HandoffKey) -> None:
        """Accept no more writes under this key. Does not block; `revoked` comes from another thread, also for a key
        that is not admitted. To be called on every abort, and when the sequence is resident."""

    def close(self) -> None:
        """End all threads and connections and free every descriptor and mapping. Idempotent."""
