"""The seam between the `nccl` transport and NCCL with CUDA: ordering, deadlines and aborts are on our side.

A communicator here has two ranks: 0 receives, 1 sends. `library` implements it over the real libraries, `double` over
unix sockets and host memory, with the same semantics. Both know these rules:

- a send moves nothing until the peer has posted the receive that matches it;
- a group is one: it completes when all of its operations have;
- a peer that dies is not noticed: a posted group hangs for ever, unless it is aborted;
- nothing here blocks, except `abort`, which returns once the library has let go;
- one thread calls all methods of a device and of its communicators: an abort with another thread inside is undefined.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

UNIQUE_ID_BYTES = 128
RECEIVER, SENDER = 0, 1


class CommunicatorError(Exception):
    """NCCL or CUDA reported an error. The communicator is of no more use, and is to be aborted."""


@dataclass(frozen=True, slots=True)
class Span:
    """Device memory: one send, or one receive."""

    address: int
    bytes: int


class Communicator(Protocol):
    """A pair of ranks, with a stream of its own. Each method raises `CommunicatorError`."""

    def post(self, group: Sequence[Span], fence: object | None) -> None:
        """Send or receive these, by rank, in one group call; only when `poll` was True last. The stream waits for
        `fence` first, which the engine recorded after the kernels that fill the blocks."""

    def poll(self) -> bool:
        """Whether everything begun has ended: the initialisation, and the group that was posted last."""

    def abort(self) -> None:
        """End the group under way, and free the library's side of it. At most once, and nothing but `drained` after."""

    def drained(self) -> bool:
        """After `abort`: whether the stream has run dry, so that no byte is read or written any more. Frees it then."""


class Device(Protocol):
    def mint(self) -> bytes:
        """A new unique id, of `UNIQUE_ID_BYTES`. Each one leaves a socket and a thread behind."""

    def open(self, unique_id: bytes, rank: int) -> Communicator:
        """Begin the initialisation, which ends only when both ranks have begun it. Raises `CommunicatorError`."""
