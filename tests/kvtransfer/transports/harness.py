"""One receiver in the test's process, writers elsewhere: what the conformance suite needs of every transport."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from baton.model import KvLayout
from baton.spec import HandoffKey, ProcessRef
from kvtransfer.blocks.memory import PoolMemory
from kvtransfer.handoffs.messages import BlockMove, Ticket
from kvtransfer.transports.base import Channel, Receiver, WriteReceipt
from kvtransfer.transports.memory import MemoryNetwork, MemoryReceiver, MemoryWriter
from kvtransfer.transports.nccl.double import DoubleDevice
from kvtransfer.transports.nccl.issuer import Issuer
from kvtransfer.transports.nccl.receiver import NcclReceiver
from kvtransfer.transports.nixl.receiver import NixlReceiver
from kvtransfer.transports.receiver import SocketReceiver
from kvtransfer.transports.shm.receiver import ShmReceiver
from kvtransfer.transports.sockets import split_endpoint
from kvtransfer.transports.tcp.receiver import TcpReceiver
from tests.kvtransfer.transports.patterns import fill, pattern

GENEROUS = 60.0
LAYOUT = KvLayout(layers=4, kv_heads=2, head_dim=64, dtype="float32")  # 64 KiB a block
BLOCKS = 64
ROOT = Path(__file__).parents[3]


class Recorder:
    """`ReceiverEvents` that remembers; a test waits for what it expects."""

    def __init__(self) -> None:
        self.landings: list[tuple[HandoffKey, int, tuple[int, ...]]] = []
        self.revocations: list[HandoffKey] = []
        self.gone: list[str] = []
        self.refusals: list[tuple[HandoffKey, str]] = []
        self.flowing = threading.Event()
        self.flowing.set()
        self._changed = threading.Condition()

    def landed(self, key: HandoffKey, generation: int, indices: Sequence[int]) -> None:
        self.flowing.wait(GENEROUS)
        self._add(self.landings, (key, generation, tuple(indices)))

    def revoked(self, key: HandoffKey) -> None:
        self._add(self.revocations, key)

    def writer_gone(self, incarnation: str) -> None:
        self._add(self.gone, incarnation)

    def refused_write(self, key: HandoffKey, why: str) -> None:
        self._add(self.refusals, (key, why))

    def wait(self, condition: Callable[[Recorder], bool]) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: condition(self), GENEROUS), "the event did not come"

    def landed_indices(self, key: HandoffKey) -> set[int]:
        with self._changed:
            return {index for landed, _, indices in self.landings if landed == key for index in indices}

    def _add(self, events: list[Any], event: object) -> None:
        with self._changed:
            events.append(event)
            self._changed.notify_all()


class Writer(Protocol):
    incarnation: str
    seed: int

    def connect(self, endpoint: str, seconds: float = GENEROUS) -> None: ...
    def write(self, ticket: Ticket, moves: Sequence[BlockMove], seconds: float = GENEROUS) -> WriteReceipt: ...
    def hammer(self, ticket: Ticket, moves: Sequence[BlockMove]) -> None: ...
    def hammered(self) -> None: ...
    def kill(self) -> None: ...
    def close(self) -> None: ...


class LocalWriter:
    """A writer of the in-memory double."""

    def __init__(self, network: MemoryNetwork, incarnation: str, seed: int) -> None:
        self.incarnation = incarnation
        self.seed = seed
        self.memory = PoolMemory(LAYOUT, BLOCKS, shared=False)
        fill(self.memory, seed)
        self.transport = MemoryWriter(self.memory, incarnation, network)
        self._channel: Channel | None = None
        self._threads = ThreadPoolExecutor(1)
        self._hammering: Future[None] | None = None

    def connect(self, endpoint: str, seconds: float = GENEROUS) -> None:
        receiver = ProcessRef("receiver", "r", "")
        self._channel = self.transport.connect(endpoint, receiver, time.monotonic() + seconds)

    def write(self, ticket: Ticket, moves: Sequence[BlockMove], seconds: float = GENEROUS) -> WriteReceipt:
        assert self._channel is not None
        return self._channel.write(ticket, moves, time.monotonic() + seconds)

    def hammer(self, ticket: Ticket, moves: Sequence[BlockMove]) -> None:
        def forever() -> None:
            while True:
                self.write(ticket, moves)

        self._hammering = self._threads.submit(forever)

    def hammered(self) -> None:
        """Waits for the error that ends a `hammer`."""
        assert self._hammering is not None
        assert self._hammering.exception(GENEROUS) is not None

    def kill(self) -> None:
        self.transport.close()

    def close(self) -> None:
        self.transport.close()
        if self._hammering is not None:
            assert self._hammering.exception(GENEROUS) is not None
        if self._channel is not None:
            self._channel.close()
        self._threads.shutdown()
        self.memory.close()


class ProcessWriter:
    """A writer in a real process."""

    def __init__(self, kind: str, incarnation: str, seed: int) -> None:
        self.incarnation = incarnation
        self.seed = seed
        command = [sys.executable, "-m", "tests.kvtransfer.transports.writer_process"]
        self.process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._put((kind, incarnation, LAYOUT, BLOCKS, seed))

    def connect(self, endpoint: str, seconds: float = GENEROUS) -> None:
        self._ask("connect", endpoint, seconds)

    def write(self, ticket: Ticket, moves: Sequence[BlockMove], seconds: float = GENEROUS) -> WriteReceipt:
        answer = self._ask("write", ticket, _plain(moves), seconds)
        assert isinstance(answer, WriteReceipt)
        return answer

    def hammer(self, ticket: Ticket, moves: Sequence[BlockMove]) -> None:
        self._put(("hammer", (ticket, _plain(moves))))

    def hammered(self) -> None:
        """Waits for the error that ends a `hammer`, or for the end of the process."""
        assert self.process.poll() is not None or isinstance(self.answer(), Exception)

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(GENEROUS)

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        try:
            self.process.wait(GENEROUS)
        finally:
            self.process.kill()
            self.process.stdout.close()

    def _put(self, message: object) -> None:
        assert self.process.stdin is not None
        pickle.dump(message, self.process.stdin)
        self.process.stdin.flush()

    def answer(self) -> object:
        """What the writer says next; of a `hammer`, the error that ended it."""
        assert self.process.stdout is not None
        said: object = pickle.load(self.process.stdout)
        return said

    def _ask(self, verb: str, *arguments: object) -> object:
        self._put((verb, arguments))
        answer = self.answer()
        if isinstance(answer, Exception):
            raise answer
        return answer


class Bench:
    """A receiver of one kind, and as many writers as a test wants."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.events = Recorder()
        self.memory = PoolMemory(LAYOUT, BLOCKS)
        self.network = MemoryNetwork()
        self.issuer = Issuer(DoubleDevice()) if kind == "nccl" else None
        self.receiver = self._receiver(self.memory, "receiver")
        self._writers: list[Writer] = []
        self._beside: list[tuple[Receiver, PoolMemory]] = []

    def writer(self, incarnation: str = "writer") -> Writer:
        seed = len(self._writers) + 1
        if self.kind == "memory":
            new: Writer = LocalWriter(self.network, incarnation, seed)
        else:
            new = ProcessWriter(self.kind, incarnation, seed)
        self._writers.append(new)
        new.connect(self.receiver.endpoint())
        return new

    def beside(self) -> Receiver:
        """Another receiver of this kind, of another pool of the same layout; it is closed with this one."""
        memory = PoolMemory(LAYOUT, BLOCKS)
        other = self._receiver(memory, "beside")
        self._beside.append((other, memory))
        return other

    def ticket(self, blocks: Sequence[int], cached: int = 0, writer: str = "writer", generation: int = 1) -> Ticket:
        key = HandoffKey(os.urandom(16), 1)
        ticket = Ticket(key, generation, os.urandom(16), tuple(blocks), cached, writer)
        self.receiver.admit(ticket)
        return ticket

    def content(self, block: int) -> bytes:
        return bytes(self.memory.block(block))

    def stall(self, writer: Writer) -> None:
        """From now on the receiver of this writer's next write does not answer."""
        if self.kind == "memory":
            self.network.faults(writer.incarnation, self.receiver.endpoint()).flowing.clear()
        self.events.flowing.clear()

    def close(self) -> None:
        self.events.flowing.set()
        for writer in self._writers:
            if self.kind == "memory":
                self.network.faults(writer.incarnation, self.receiver.endpoint()).flowing.set()
            writer.close()
        self.receiver.close()
        for other, memory in self._beside:
            other.close()
            memory.close()
        if self.issuer is not None:
            self.issuer.close()
        self.memory.close()

    def _receiver(self, memory: PoolMemory, incarnation: str) -> Receiver:
        if self.kind == "memory":
            return MemoryReceiver(memory, self.events, incarnation, self.network)
        if self.kind == "shm":
            return ShmReceiver(memory, self.events, checksums=True)
        if self.issuer is not None:
            return NcclReceiver(memory, self.events, self.issuer)
        if self.kind == "nixl":
            return NixlReceiver(memory, self.events, checksums=True)
        return TcpReceiver(memory, self.events, checksums=True)


def host_and_port(receiver: Receiver) -> tuple[str, int]:
    """Where a receiver's connections come to."""
    host, _, port = split_endpoint(receiver.endpoint())[0].rpartition(":")
    return host.strip("[]"), int(port)


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + GENEROUS
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.005)


def settle(receiver: Receiver) -> None:
    """Waits until the receiver's thread has served all that was ready before this call."""
    assert isinstance(receiver, SocketReceiver)
    for _ in range(2):  # the first call may come in the middle of a turn
        served = threading.Event()
        assert receiver._reactor.call(served.set)
        assert served.wait(GENEROUS)


def moves(ticket: Ticket, indices: Sequence[int], first_source: int = 0) -> list[BlockMove]:
    """Block `index` comes from source block `first_source + index`."""
    return [BlockMove(first_source + i, ticket.blocks[i], i) for i in indices]


def expected(writer: Writer, source: int) -> bytes:
    return pattern(writer.seed, source, LAYOUT.block_bytes)


def _plain(moves: Sequence[BlockMove]) -> list[tuple[int, int, int]]:
    return [(m.source, m.destination, m.index) for m in moves]
