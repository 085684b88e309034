"""Bytes that the transports over sockets share. Little-endian throughout.

A batch is BATCH(magic, count, identity) TABLE[count]; its answer is ACK(status, text).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import NamedTuple

from baton.spec import HandoffKey
from kvtransfer.handoffs.messages import Ticket

IDENTITY = struct.Struct("<16sIQ16s")
BATCH_MAGIC = b"BTKV"
PREFIX = struct.Struct("<4sI")  # magic, count; the identity follows
BATCH_BYTES = PREFIX.size + IDENTITY.size
ENTRY = struct.Struct("<III")  # index in the sequence, destination block, CRC-32 of the bytes (0 without checksums)
ACK = struct.Struct("<4sHH")  # magic, status, bytes of text that follow
MAX_COUNT = 256
MAX_TEXT = 512


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
    """One block of a batch's table."""

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


def unpack_table(data: bytes | bytearray | memoryview) -> list[BlockEntry]:
    return [BlockEntry(*fields) for fields in ENTRY.iter_unpack(data)]


def pack_ack(status: Status, text: str = "") -> bytes:
    raw = text.encode()[:MAX_TEXT]
    return ACK.pack(BATCH_MAGIC, status, len(raw)) + raw
