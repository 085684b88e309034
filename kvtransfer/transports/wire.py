"""Bytes that the transports over sockets share, little-endian throughout, and the checks that all transports share.

A batch is BATCH(magic, count, identity) TABLE[count]; its answer is ACK(status, text).
"""

from __future__ import annotations

import hmac
import struct
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import NamedTuple

from baton.errors import Mismatch, WriteRefused, WriteRevoked
from baton.spec import HandoffKey
from kvtransfer.blocks.memory import PoolMemory
from kvtransfer.handoffs.messages import Ticket

IDENTITY = struct.Struct("<16sIQ16s")
BATCH_MAGIC = b"BTKV"
PREFIX = struct.Struct("<4sI")  # magic, count; the identity follows
BATCH_BYTES = PREFIX.size + IDENTITY.size
ENTRY = struct.Struct("<III")  # index in the sequence, destination block, CRC-32 of the bytes (0 without checksums)
ACK = struct.Struct("<4sHH")  # magic, status, bytes of text that follow
TOKEN_BYTES = 16
"""Of the receiver's token, which its endpoint names and each writer's first message repeats."""
ELSEWHERE = b"BTNO"
"""In place of the magic in a receiver's answer: the token is not its own, so the writer means another receiver."""
MAX_COUNT = 256
MAX_TEXT = 512
NO_GRANT = "no such grant"
REVOKED = "the handoff was revoked"
OVER = frozenset({NO_GRANT, REVOKED})
"""Refusals that the end of a handoff brings about by itself; all others are mistakes."""


class Flags(IntFlag):
    CHECKSUMS = 1
    TLS = 2


class Status(IntEnum):
    OK = 0
    REFUSED = 1
    CHECKSUM = 2


class Identity(NamedTuple):
    """The claim of a write: checked against the admitted ticket before anything else."""

    key: HandoffKey
    generation: int
    write_token: bytes


@dataclass(frozen=True, slots=True)
class BlockEntry:
    index: int
    destination: int
    checksum: int


def pack_identity(ticket: Ticket) -> bytes:
    return IDENTITY.pack(ticket.key.attempt, ticket.key.handoff, ticket.generation, ticket.write_token)


def unpack_identity(data: bytes | bytearray | memoryview, offset: int = 0) -> Identity:
    attempt, handoff, generation, token = IDENTITY.unpack_from(data, offset)
    return Identity(HandoffKey(attempt, handoff), generation, token)


def pack_batch(ticket: Ticket, entries: Sequence[BlockEntry]) -> bytes:
    """The header and the table of one batch of at most `MAX_COUNT` blocks."""
    table = b"".join(ENTRY.pack(e.index, e.destination, e.checksum) for e in entries)
    return PREFIX.pack(BATCH_MAGIC, len(entries)) + pack_identity(ticket) + table


def pack_ack(status: Status, text: str = "") -> bytes:
    raw = text.encode()[:MAX_TEXT]
    return ACK.pack(BATCH_MAGIC, status, len(raw)) + raw


def refusal(
    admitted: Ticket | None, identity: Identity, targets: Iterable[tuple[int, int]], writer: str | None = None
) -> str | None:
    """The reason to refuse a write, or None. `targets` are (index, destination) of its blocks; `writer` is the
    incarnation at the other end, where the transport knows it."""
    if admitted is None:
        return NO_GRANT
    if admitted.generation != identity.generation:
        return f"generation {identity.generation}, the grant is of {admitted.generation}"
    if not hmac.compare_digest(admitted.write_token, identity.write_token):
        return "wrong write token"
    if writer is not None and admitted.writer != writer:
        return "the ticket belongs to another process"
    wrong = next(((i, block) for i, block in targets if admitted.destination(i) != block), None)
    return None if wrong is None else f"block {wrong[0]} may not go to {wrong[1]}"


def refused(key: HandoffKey, why: str) -> WriteRefused:
    """The writer's error for a refusal."""
    return (WriteRevoked if why in OVER else WriteRefused)(f"{key}: {why}")


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
