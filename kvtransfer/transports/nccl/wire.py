"""Messages on the control connection of an `nccl` pair; the blocks go from device to device.

writer    HELLO(version, block bytes, receiver's token, incarnation)
                                                    -> WELCOME(version, block bytes); closed where they differ, or
                                                       its magic is ELSEWHERE: the token is another receiver's
writer    BATCH(serial, seconds, identity, runs)    -> ANSWER(serial, REFUSED, why), or
                                                       PAIR(number, unique id) where there is no communicator yet, and
                                                       ANSWER(serial, READY) once its receives are posted
writer    SENT(serial), its sends having ended      -> ANSWER(serial, DONE): all blocks are in place and count
either    GONE(number): its end of that communicator is being aborted
receiver  ANSWER(serial, FAILED, why): nothing of the batch counts; it may be sent again

Only a batch whose writer says that it has sent it whole counts: one whose deadline passed, or that was given up, never
does, whatever the device still moves.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

from kvtransfer.handoffs.messages import BlockMove, Ticket
from kvtransfer.transports.wire import IDENTITY, Identity, pack_identity, unpack_identity

MAGIC = b"BTNC"
VERSION = 2
FRAME = struct.Struct("<BI")  # op, bytes that follow
HELLO = struct.Struct("<4sHQ")  # magic, version, block bytes; a writer's has token and incarnation after it
BATCH = struct.Struct("<Id")  # serial, seconds until the writer's deadline; identity and runs follow
RUN = struct.Struct("<III")  # first index in the sequence, first destination block, blocks
NUMBER = struct.Struct("<I")  # a batch's serial, or a communicator's number within its connection
ANSWER = struct.Struct("<IB")  # serial, status; text follows
MAX_RUNS = 256
MAX_BODY = BATCH.size + IDENTITY.size + MAX_RUNS * RUN.size
MAX_TEXT = 512


class NcclOp(IntEnum):
    HELLO = 1
    BATCH = 2
    SENT = 3
    GONE = 4
    WELCOME = 5
    PAIR = 6
    ANSWER = 7


class BatchStatus(IntEnum):
    READY = 0
    DONE = 1
    REFUSED = 2
    FAILED = 3


class BlockRun(NamedTuple):
    """Neighbouring blocks of the sequence that are neighbours on both sides: one send and one receive."""

    first: int
    destination: int
    blocks: int


class Malformed(Exception):
    """The peer does not speak this protocol."""


@dataclass(frozen=True, slots=True)
class RunBatch:
    serial: int
    seconds: float
    identity: Identity
    runs: tuple[BlockRun, ...]

    @property
    def targets(self) -> Iterator[tuple[int, int]]:
        """(index, destination) of each block, one by one: a run of a stranger may claim billions."""
        return ((run.first + i, run.destination + i) for run in self.runs for i in range(run.blocks))


def frame(op: NcclOp, body: bytes = b"") -> bytes:
    return FRAME.pack(op, len(body)) + body


def take_frame(buffer: bytearray) -> tuple[NcclOp, bytes] | None:
    """Remove the first frame; None while it has not come whole. Raises `Malformed`."""
    if len(buffer) < FRAME.size:
        return None
    op, length = FRAME.unpack_from(buffer)
    if op not in tuple(NcclOp) or length > MAX_BODY:
        raise Malformed(f"op {op} with {length} bytes")
    if len(buffer) < FRAME.size + length:
        return None
    body = bytes(buffer[FRAME.size : FRAME.size + length])
    del buffer[: FRAME.size + length]
    return NcclOp(op), body


def runs_of(moves: Sequence[BlockMove]) -> list[tuple[BlockRun, int]]:
    """Neighbours joined; each run with its first source block."""
    joined: list[tuple[BlockRun, int]] = []
    for move in moves:
        if joined:
            run, source = joined[-1]
            ends = (run.first + run.blocks, run.destination + run.blocks, source + run.blocks)
            if (move.index, move.destination, move.source) == ends:
                joined[-1] = (run._replace(blocks=run.blocks + 1), source)
                continue
        joined.append((BlockRun(move.index, move.destination, 1), move.source))
    return joined


def pack_batch(serial: int, seconds: float, ticket: Ticket, runs: Sequence[BlockRun]) -> bytes:
    return frame(
        NcclOp.BATCH, BATCH.pack(serial, seconds) + pack_identity(ticket) + b"".join(RUN.pack(*run) for run in runs)
    )


def unpack_batch(body: bytes) -> RunBatch:
    """Raises `Malformed`."""
    head = BATCH.size + IDENTITY.size
    if len(body) <= head or (len(body) - head) % RUN.size:
        raise Malformed(f"a batch of {len(body)} bytes")
    serial, seconds = BATCH.unpack_from(body)
    runs = tuple(BlockRun(*fields) for fields in RUN.iter_unpack(body[head:]))
    if not 0 < seconds < float("inf") or any(run.blocks < 1 for run in runs):
        raise Malformed("a batch without time or blocks")
    return RunBatch(serial, seconds, unpack_identity(body, BATCH.size), runs)


def pack_number(op: NcclOp, number: int, rest: bytes = b"") -> bytes:
    """SENT, GONE, and PAIR with its unique id."""
    return frame(op, NUMBER.pack(number) + rest)


def unpack_number(body: bytes, rest: int = 0) -> tuple[int, bytes]:
    """Raises `Malformed`."""
    if len(body) != NUMBER.size + rest:
        raise Malformed(f"a number in {len(body)} bytes")
    return NUMBER.unpack_from(body)[0], body[NUMBER.size :]


def pack_answer(serial: int, status: BatchStatus, text: str = "") -> bytes:
    return frame(NcclOp.ANSWER, ANSWER.pack(serial, status) + text.encode()[:MAX_TEXT])


def unpack_answer(body: bytes) -> tuple[int, BatchStatus, str]:
    """Raises `Malformed`."""
    if len(body) < ANSWER.size:
        raise Malformed("a short answer")
    serial, status = ANSWER.unpack_from(body)
    if status not in tuple(BatchStatus):
        raise Malformed(f"status {status}")
    return serial, BatchStatus(status), body[ANSWER.size :].decode(errors="replace")
