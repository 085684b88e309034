"""A receiver and writers over the double, all in this process, whose faults a test holds."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from baton.spec import ProcessRef
from kvtransfer.blocks.memory import PoolMemory
from kvtransfer.handoffs.messages import Ticket
from kvtransfer.transports.base import WriteReceipt
from kvtransfer.transports.nccl.double import DoubleDevice
from kvtransfer.transports.nccl.issuer import Issuer
from kvtransfer.transports.nccl.receiver import NcclReceiver
from kvtransfer.transports.nccl.writer import NcclChannel, NcclWriter
from tests.kvtransfer.transports.harness import BLOCKS, GENEROUS, LAYOUT, Bench, moves
from tests.kvtransfer.transports.patterns import fill, pattern

RECEIVER = ProcessRef("receiver", "r", "")


@dataclass
class Side:
    """A writer in this process."""

    name: str
    seed: int
    max_links: int = 64
    device: DoubleDevice = field(default_factory=DoubleDevice)
    fence: threading.Event | None = None
    channels: list[NcclChannel] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.memory = PoolMemory(LAYOUT, BLOCKS, shared=False)
        fill(self.memory, self.seed)
        self.issuer = Issuer(self.device, self.max_links)
        self.writer = NcclWriter(self.memory, self.name, self.issuer, lambda: self.fence)

    def connect(self, receiver: NcclReceiver) -> NcclChannel:
        channel = self.writer.connect(receiver.endpoint(), RECEIVER, time.monotonic() + GENEROUS)
        self.channels.append(channel)
        return channel

    def block(self, index: int) -> bytes:
        return pattern(self.seed, index, LAYOUT.block_bytes)

    def close(self) -> None:
        self.device.faults.flowing.set()
        self.device.faults.draining.set()
        for channel in self.channels:
            channel.close()
        self.writer.close()
        self.issuer.close()
        self.memory.close()


class Setup:
    """A receiver and its writers, all on doubles whose faults the test holds."""

    def __init__(self, max_links: int = 64) -> None:
        self.device = DoubleDevice()
        self.bench = Bench("nccl")
        self.bench.receiver.close()
        assert self.bench.issuer is not None
        self.bench.issuer.close()
        self.bench.issuer = Issuer(self.device, max_links)
        self.bench.receiver = self.receiver = NcclReceiver(self.bench.memory, self.bench.events, self.bench.issuer)
        self.events = self.bench.events
        self.threads = ThreadPoolExecutor(8)
        self.sides: list[Side] = []

    def side(self, name: str = "writer", max_links: int = 64) -> Side:
        self.sides.append(Side(name, len(self.sides) + 1, max_links))
        return self.sides[-1]

    def write(
        self, channel: NcclChannel, ticket: Ticket, indices: range, seconds: float = GENEROUS
    ) -> Future[WriteReceipt]:
        deadline = time.monotonic() + seconds
        return self.threads.submit(channel.write, ticket, moves(ticket, indices), deadline)

    def intact(self, side: Side, ticket: Ticket) -> bool:
        return all(self.bench.content(ticket.blocks[i]) == side.block(i) for i in ticket.writable)

    def close(self) -> None:
        self.device.faults.flowing.set()
        self.device.faults.draining.set()
        for side in self.sides:
            side.close()
        self.bench.close()
        self.threads.shutdown()
