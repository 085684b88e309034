"""The checks of every transport: of a write, on both sides; of the bytes that arrived; of a connection's options."""

from __future__ import annotations

import hmac
import zlib
from collections.abc import Iterable, Sequence

from baton.errors import Mismatch, WriteRefused
from kvtransfer.blocks.memory import PoolMemory
from kvtransfer.handoffs.messages import BlockMove, Ticket
from kvtransfer.transports.wire import Flags, Identity


def plan(ticket: Ticket, moves: Sequence[BlockMove], source_blocks: int) -> None:
    """The writer's own check, before anything is sent. Raises `WriteRefused` for a move that its ticket does not allow;
    a source block outside the writer's own pool is a fault of ours."""
    for move in moves:
        assert 0 <= move.source < source_blocks, f"source block {move.source} of {source_blocks}"
        if ticket.destination(move.index) != move.destination:
            raise WriteRefused(f"{ticket.key}: block {move.index} may not go to {move.destination}")


def refusal(
    admitted: Ticket | None, identity: Identity, targets: Iterable[tuple[int, int]], writer: str | None = None
) -> str | None:
    """Why the receiver does not take a write; None when it does. `targets` are (index, destination) of its blocks;
    `writer` is the incarnation at the other end, where the transport knows it."""
    why = identity_refusal(admitted, identity)
    if why is not None or admitted is None:
        return why
    if writer is not None and admitted.writer != writer:
        return "the ticket belongs to another process"
    wrong = next(((i, block) for i, block in targets if admitted.destination(i) != block), None)
    return None if wrong is None else f"block {wrong[0]} may not go to {wrong[1]}"


def identity_refusal(admitted: Ticket | None, identity: Identity) -> str | None:
    """The part that comes first, and that a stranger could have made up."""
    if admitted is None:
        return "no such grant"
    if admitted.generation != identity.generation:
        return f"generation {identity.generation}, the grant is of {admitted.generation}"
    if not hmac.compare_digest(admitted.write_token, identity.write_token):
        return "wrong write token"
    return None


def checksum(memory: PoolMemory, block: int, flags: Flags) -> int:
    """CRC-32 of a block's bytes; 0 without checksums."""
    return zlib.crc32(memory.block(block)) if Flags.CHECKSUMS in flags else 0


def intact(memory: PoolMemory, block: int, sent: int, flags: Flags) -> bool:
    """Whether a block has the checksum that it was sent with; always without checksums."""
    return Flags.CHECKSUMS not in flags or zlib.crc32(memory.block(block)) == sent


def corrupt(index: int) -> str:
    """The refusal of a block that is not `intact`."""
    return f"block {index} arrived with other bytes than were sent"


def agree(*options: tuple[str, object, object]) -> None:
    """Raises `Mismatch` for the first (name, ours, theirs) that differ."""
    for name, ours, theirs in options:
        if ours != theirs:
            raise Mismatch(name, str(ours), str(theirs))
