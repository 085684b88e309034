"""What goes over the control connection of a NIXL pair; the blocks themselves go from agent to agent.

writer    HELLO(version, flags, block bytes, incarnation)
receiver  WELCOME(version, flags, block bytes, blocks, address of the pool, agent's metadata)   or differs, and closes
writer    BEGIN(identity, count) TABLE[count]  -> ACK(status, text)    nothing is written before OK
          the write, whose notification is the number of the batch
receiver                                       -> ACK(status, text)    all in place and checked, or none counts
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from kvtransfer.transports.tcp import wire as tcp_wire

MAGIC = b"BTNX"
VERSION = 1
HELLO = struct.Struct("<4sHHQH")  # magic, version, flags, block bytes, length of the incarnation that follows
WELCOME = struct.Struct("<4sHHQQQI")  # magic, version, flags, block bytes, blocks, address, length of the metadata
NOTICE = struct.Struct("<Q")  # the number of the batch on its connection, from 0
MAX_METADATA = 1 << 20

Flags = tcp_wire.Flags
Status = tcp_wire.Status
pack_batch = tcp_wire.pack_batch
pack_ack = tcp_wire.pack_ack


@dataclass(frozen=True, slots=True)
class Target:
    """Where a receiver's pool is, for NIXL."""

    address: int
    blocks: int
    metadata: bytes


def pack_hello(flags: int, block_bytes: int, incarnation: str) -> bytes:
    raw = incarnation.encode()
    return HELLO.pack(MAGIC, VERSION, flags, block_bytes, len(raw)) + raw


def pack_welcome(flags: int, block_bytes: int, target: Target) -> bytes:
    head = WELCOME.pack(MAGIC, VERSION, flags, block_bytes, target.blocks, target.address, len(target.metadata))
    return head + target.metadata
