"""A receiver in this process and writers in others, over `nccl`: on one GPU with the real library (`nccl-cuda`), or
over the double (`nccl`), which shows that this program itself is right where there is no GPU.

    python -m tests.kvtransfer.transports.nccl_pair KIND SCENARIO
"""

from __future__ import annotations

import os
import random
import signal
import sys
from collections.abc import Callable

from baton.spec import HandoffKey
from kvtransfer.blocks.memory import PoolMemory
from kvtransfer.handoffs.messages import Ticket
from kvtransfer.transports.nccl.double import DoubleDevice
from kvtransfer.transports.nccl.issuer import Issuer
from kvtransfer.transports.nccl.library import NcclDevice
from kvtransfer.transports.nccl.receiver import NcclReceiver
from tests.kvtransfer.transports.cuda_memory import CudaMemory
from tests.kvtransfer.transports.harness import BLOCKS, LAYOUT, ProcessWriter, Recorder, expected, moves

ZERO = bytes(LAYOUT.block_bytes)


class Pair:
    """What a scenario needs."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.host = PoolMemory(LAYOUT, BLOCKS, shared=False)
        self.events = Recorder()
        self.gpu = CudaMemory(self.host) if kind == "nccl-cuda" else None
        self.issuer = Issuer(NcclDevice() if self.gpu is not None else DoubleDevice())
        self.receiver = NcclReceiver(self.gpu or self.host, self.events, self.issuer)
        self.writers: list[ProcessWriter] = []

    def writer(self, name: str) -> ProcessWriter:
        self.writers.append(ProcessWriter(self.kind, name, len(self.writers) + 1))
        self.writers[-1].connect(self.receiver.endpoint())
        return self.writers[-1]

    def ticket(self, blocks: list[int], writer: str) -> Ticket:
        ticket = Ticket(HandoffKey(os.urandom(16), 1), 1, os.urandom(16), tuple(blocks), 0, writer)
        self.receiver.admit(ticket)
        return ticket

    def block(self, index: int) -> bytes:
        return self.gpu.read(index) if self.gpu is not None else bytes(self.host.block(index))

    def clear(self) -> None:
        for index in range(BLOCKS):
            self.host.block(index)[:] = ZERO
        if self.gpu is not None:
            self.gpu.clear()

    def close(self) -> None:
        for writer in self.writers:
            writer.close()
        self.receiver.close()
        self.issuer.close()


def intact(pair: Pair) -> None:
    """Every block of a pool, scattered, from two writers in turn, in batches of any size."""
    draw = random.Random(7)
    for name in ("one", "two", "one", "two"):
        writer = next((w for w in pair.writers if w.incarnation == name), None) or pair.writer(name)
        blocks = draw.sample(range(BLOCKS), BLOCKS)
        ticket = pair.ticket(blocks, name)
        first = 0
        while first < BLOCKS:
            count = min(draw.randint(1, 20), BLOCKS - first)
            receipt = writer.write(ticket, moves(ticket, range(first, first + count)))
            assert receipt.bytes == count * LAYOUT.block_bytes
            first += count
        assert pair.events.landed_indices(ticket.key) == set(range(BLOCKS))
        assert all(pair.block(blocks[i]) == expected(writer, i) for i in range(BLOCKS))


def killed(pair: Pair) -> None:
    """A writer dies by kill -9 in the middle; the grant is proven unwritten, and another writer is served."""
    writer = pair.writer("one")
    ticket = pair.ticket(list(range(BLOCKS)), "one")
    writer.hammer(ticket, moves(ticket, range(BLOCKS)))
    pair.events.wait(lambda e: len(e.landings) >= 2)
    writer.kill()
    pair.receiver.revoke(ticket.key)
    pair.events.wait(lambda e: ticket.key in e.revocations)
    pair.clear()
    other, second = pair.writer("two"), pair.ticket(list(range(8)), "two")
    other.write(second, moves(second, range(8)))
    assert all(pair.block(block) == expected(other, block) for block in range(8))
    assert all(pair.block(block) == ZERO for block in range(8, BLOCKS))


def stopped(pair: Pair) -> None:
    """A writer freezes in the middle and comes back later: the proof needs nothing of it, and its late sends go
    nowhere."""
    writer = pair.writer("one")
    ticket = pair.ticket(list(range(BLOCKS)), "one")
    writer.hammer(ticket, moves(ticket, range(BLOCKS)))
    pair.events.wait(lambda e: len(e.landings) >= 2)
    writer.process.send_signal(signal.SIGSTOP)
    pair.receiver.revoke(ticket.key)
    pair.events.wait(lambda e: ticket.key in e.revocations)
    pair.clear()
    writer.process.send_signal(signal.SIGCONT)
    writer.hammered()
    assert all(pair.block(block) == ZERO for block in range(BLOCKS))


SCENARIOS: dict[str, Callable[[Pair], None]] = {"intact": intact, "killed": killed, "stopped": stopped}


def main() -> None:
    kind, scenario = sys.argv[1:]
    pair = Pair(kind)
    try:
        SCENARIOS[scenario](pair)
    finally:
        pair.close()
    print("intact", scenario)


if __name__ == "__main__":
    main()
