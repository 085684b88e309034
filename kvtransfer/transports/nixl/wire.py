"""Messages on the control connection of a NIXL pair; the blocks go from agent to agent.

writer    HELLO(version, flags, block bytes, receiver's token, incarnation)
receiver  WELCOME(version, flags, block bytes, blocks, address of the pool, agent's metadata)   or differs, and closes;
          its magic is ELSEWHERE where the token is another receiver's
writer    BATCH(identity, count) TABLE[count]  -> ACK(status, text)    nothing is written before OK
          the write, whose notification is the number of the batch
receiver                                       -> ACK(status, text)    all in place and checked, or none counts
"""

from __future__ import annotations

import struct

MAGIC = b"BTNX"
VERSION = 2
HELLO = struct.Struct("<4sHHQH")  # magic, version, flags, block bytes, length of the incarnation, after the token
WELCOME = struct.Struct("<4sHHQQQI")  # magic, version, flags, block bytes, blocks, address, length of the metadata
NOTICE = struct.Struct("<Q")  # the number of the batch on its connection, from 0
MAX_METADATA = 1 << 20


def pack_hello(flags: int, block_bytes: int, token: bytes, incarnation: str) -> bytes:
    raw = incarnation.encode()
    return HELLO.pack(MAGIC, VERSION, flags, block_bytes, len(raw)) + token + raw


def pack_welcome(
    flags: int, block_bytes: int, blocks: int, address: int, metadata: bytes, magic: bytes = MAGIC
) -> bytes:
    return WELCOME.pack(magic, VERSION, flags, block_bytes, blocks, address, len(metadata)) + metadata
