"""What goes over a TCP connection of a pair.

writer    HELLO(version, flags, block bytes)     -> HELLO of the receiver; both close it where they differ
writer    BATCH(identity, count) TABLE[count] and then the blocks' bytes, in the order of the table
                                                 -> ACK(status, text) once all are in place, or none counts
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum, IntFlag

from kvtransfer.handoffs.messages import Ticket
from kvtransfer.transports.wire import IDENTITY, pack_identity

MAGIC = b"BTKV"
VERSION = 1
HELLO = struct.Struct("<4sHHQ")  # magic, version, flags, block bytes
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


@dataclass(frozen=True, slots=True)
class Entry:
    index: int
    destination: int
    checksum: int


def pack_batch(ticket: Ticket, entries: Sequence[Entry]) -> bytes:
    """The header and the table of one batch of at most `MAX_COUNT` blocks."""
    table = b"".join(ENTRY.pack(e.index, e.destination, e.checksum) for e in entries)
    return PREFIX.pack(MAGIC, len(entries)) + pack_identity(ticket) + table


def unpack_table(data: bytes | bytearray | memoryview) -> list[Entry]:
    return [Entry(*fields) for fields in ENTRY.iter_unpack(data)]


def pack_ack(status: Status, text: str = "") -> bytes:
    raw = text.encode()[:MAX_TEXT]
    return ACK.pack(MAGIC, status, len(raw)) + raw
