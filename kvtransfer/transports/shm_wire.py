"""What goes over the unix socket of a shared-memory pair: one message per packet, one request at a time.

writer    HELLO(block bytes, incarnation)            -> WELCOME(blocks, block bytes) with the pool's memfd
writer    CLAIM(identity, digest of the block table) -> REPLY     before the first byte of a ticket
writer    DONE(identity, indices)                    -> REPLY     after the copy
"""

from __future__ import annotations

import hashlib
import struct
from enum import IntEnum
from pathlib import Path

from kvtransfer.handoff import Ticket
from kvtransfer.transports.wire import IDENTITY

MAGIC = 0x4D485342  # "BSHM"
VERSION = 1
HELLO = struct.Struct("<IHQQ")  # magic, version, block bytes, start time of the writer's process
WELCOME = struct.Struct("<IHQQ")  # magic, version, block bytes, blocks
OP = struct.Struct("<B")
TABLE_DIGEST_BYTES = 16
MAX_INDICES = 8192
MAX_PACKET = 64 * 1024


class Op(IntEnum):
    CLAIM = 1
    DONE = 2


class Status(IntEnum):
    OK = 0
    REFUSED = 1


def table_digest(ticket: Ticket) -> bytes:
    """Equal on both sides only if they mean the same blocks."""
    data = struct.pack(f"<I{len(ticket.blocks)}I", ticket.cached_blocks, *ticket.blocks)
    return hashlib.blake2b(data, digest_size=TABLE_DIGEST_BYTES).digest()


def pack_indices(indices: list[int]) -> bytes:
    return struct.pack(f"<{len(indices)}I", *indices)


def unpack_indices(data: bytes) -> list[int] | None:
    """The indices after the identity of a DONE; None when the packet is malformed."""
    body = data[OP.size + IDENTITY.size :]
    return None if len(body) % 4 else list(struct.unpack(f"<{len(body) // 4}I", body))


def start_time(pid: int) -> int:
    """When the kernel started this process, in its clock ticks; tells it from a later one with the same number.

    Raises `OSError` when there is no such process.
    """
    stat = Path(f"/proc/{pid}/stat").read_text()
    return int(stat.rpartition(")")[2].split()[19])
