"""Messages on the unix socket of a shared-memory pair: one message per packet, one request at a time.

writer    HELLO(flags, block bytes, incarnation)     -> WELCOME(flags, blocks, block bytes) with the pool's memfd, or
                                                        SORRY and why
writer    CLAIM(identity, digest of the block table) -> status, text     before the first byte of a ticket
writer    DONE(identity, entries)                    -> status, text     after the copy
"""

from __future__ import annotations

import hashlib
import struct
from enum import IntEnum
from pathlib import Path

from kvtransfer.handoffs.messages import Ticket
from kvtransfer.transports.wire import IDENTITY

MAGIC = 0x4D485342  # "BSHM"
VERSION = 2
HELLO = struct.Struct("<IHHQQ")  # magic, version, flags, block bytes, start time of the writer's process
WELCOME = struct.Struct("<IHHQQ")  # magic, version, flags, block bytes, blocks
SORRY = b"BSHM no: "  # the reason follows; a writer takes any other packet of a wrong size for a refusal too
ENTRY = struct.Struct("<II")  # index in the sequence, CRC-32 of the bytes (0 without checksums)
OP = struct.Struct("<B")
HEAD_BYTES = OP.size + IDENTITY.size
TABLE_DIGEST_BYTES = 16
MAX_ENTRIES = 4096
MAX_PACKET = 64 * 1024


class ShmOp(IntEnum):
    CLAIM = 1
    DONE = 2


def table_digest(ticket: Ticket) -> bytes:
    """Equal on both sides only if they mean the same blocks."""
    data = struct.pack(f"<I{len(ticket.blocks)}I", ticket.cached_blocks, *ticket.blocks)
    return hashlib.blake2b(data, digest_size=TABLE_DIGEST_BYTES).digest()


def start_time(pid: int) -> int:
    """The start of a process in the kernel's clock ticks, which tells it from a later one with the same number. Raises
    `OSError` when there is no such process."""
    stat = Path(f"/proc/{pid}/stat").read_text()
    return int(stat.rpartition(")")[2].split()[19])
