"""Bytes that the socket-based transports share: who a write belongs to. Little-endian throughout."""

from __future__ import annotations

import struct
from typing import NamedTuple

from baton.spec import HandoffKey
from kvtransfer.handoffs.messages import Ticket

IDENTITY = struct.Struct("<16sIQ16s")


class Identity(NamedTuple):
    """What a write claims to be: checked against the admitted ticket before anything else."""

    key: HandoffKey
    generation: int
    write_token: bytes


def pack_identity(ticket: Ticket) -> bytes:
    return IDENTITY.pack(ticket.key.attempt, ticket.key.handoff, ticket.generation, ticket.write_token)


def unpack_identity(data: bytes | bytearray | memoryview, offset: int = 0) -> Identity:
    attempt, handoff, generation, token = IDENTITY.unpack_from(data, offset)
    return Identity(HandoffKey(attempt, handoff), generation, token)
