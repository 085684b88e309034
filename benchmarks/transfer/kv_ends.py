"""The two ends of `make bench-kv`: a sender and a receiver, each a process of its own on a core of its own.

An end has one pool of blocks and a set of ways to move them. A way is made on the receiver first, which gives what the
sender needs to reach it; then the sender runs it as often as it is told. Nothing else runs on either core meanwhile.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any, Protocol

import numpy as np

from baton.engine.native.build import NativeUnavailable
from baton.engine.native.library import load
from baton.model import KvLayout
from baton.spec import HandoffKey, ProcessRef
from baton.worker.sending.mover import MOVE_BLOCKS
from kvtransfer.blocks.memory import BlockCopy, PoolMemory, copy_runs
from kvtransfer.handoffs.messages import BlockMove, Ticket
from kvtransfer.transports.base import Receiver, Writer
from kvtransfer.transports.shm.receiver import ShmReceiver
from kvtransfer.transports.shm.writer import ShmWriter
from kvtransfer.transports.tcp.receiver import TcpReceiver
from kvtransfer.transports.tcp.writer import TcpWriter

LAYOUT = KvLayout(layers=30, kv_heads=3, head_dim=64, dtype="bfloat16")
"""The embedded model's."""
POOL_BLOCKS = 768
LIMIT_S = 60.0
RECEIVER = ProcessRef("receiver", "receiver", "")


class TimedWay(Protocol):
    """Moves the first `blocks` of the plan, and returns the seconds until the last byte is known to be in place."""

    def run(self, blocks: int) -> float: ...
    def close(self) -> None: ...


class Quiet:
    """`ReceiverEvents` that nobody listens to."""

    def landed(self, key: HandoffKey, generation: int, indices: Sequence[int]) -> None: ...
    def revoked(self, key: HandoffKey) -> None: ...
    def writer_gone(self, incarnation: str) -> None: ...
    def refused_write(self, key: HandoffKey, why: str) -> None:
        raise AssertionError(f"{key}: {why}")


def plan() -> tuple[list[int], list[int]]:
    """(source, destination) blocks of the longest prompt, scattered over both pools and the same in both processes."""
    generator = random.Random(4)
    return generator.sample(range(POOL_BLOCKS), 256), generator.sample(range(POOL_BLOCKS), 256)


def ticket() -> Ticket:
    return Ticket(HandoffKey(bytes(16), 1), 1, bytes(16), tuple(plan()[1]), 0, "sender")


class Transported:
    """One of ours, in writes of as many blocks as the prefill worker gives at once."""

    def __init__(self, writer: Writer, endpoint: str) -> None:
        self._channel = writer.connect(endpoint, RECEIVER, time.monotonic() + LIMIT_S)
        sources, destinations = plan()
        self._ticket = ticket()
        self._moves = [BlockMove(s, d, i) for i, (s, d) in enumerate(zip(sources, destinations, strict=True))]
        self._writer = writer

    def run(self, blocks: int) -> float:
        started = time.perf_counter()
        for first in range(0, blocks, MOVE_BLOCKS):
            some = self._moves[first : min(blocks, first + MOVE_BLOCKS)]
            receipt = self._channel.write(self._ticket, some, time.monotonic() + LIMIT_S)
            assert receipt.bytes == len(some) * LAYOUT.block_bytes
        return time.perf_counter() - started

    def close(self) -> None:
        self._channel.close()
        self._writer.close()


class PlainCopy:
    """The same bytes from one array to another in one call; both touched before."""

    def __init__(self) -> None:
        self._from, self._to = (np.ones(256 * LAYOUT.block_bytes, np.uint8) for _ in range(2))

    def run(self, blocks: int) -> float:
        size = blocks * LAYOUT.block_bytes
        started = time.perf_counter()
        np.copyto(self._to[:size], self._from[:size])
        return time.perf_counter() - started

    def close(self) -> None: ...


class ScatteredCopy:
    """The same blocks between two pools of one process, with nothing around it."""

    def __init__(self, memory: PoolMemory, copy: BlockCopy) -> None:
        self._memory, self._copy = memory, copy
        self._target = PoolMemory(LAYOUT, POOL_BLOCKS)

    def run(self, blocks: int) -> float:
        sources, destinations = (some[:blocks] for some in plan())
        started = time.perf_counter()
        self._copy(self._target.address, self._memory.address, destinations, sources, LAYOUT.block_bytes)
        return time.perf_counter() - started

    def close(self) -> None:
        self._target.close()


class RawSocket:
    """One contiguous buffer through a loopback connection into another; one byte comes back."""

    def __init__(self, endpoint: str) -> None:
        host, _, port = endpoint.rpartition(":")
        self._socket = socket.create_connection((host, int(port)), LIMIT_S)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._from = memoryview(np.ones(256 * LAYOUT.block_bytes, np.uint8).data)

    def run(self, blocks: int) -> float:
        size = blocks * LAYOUT.block_bytes
        started = time.perf_counter()
        self._socket.sendall(size.to_bytes(8, "little"))
        self._socket.sendall(self._from[:size])
        assert self._socket.recv(1) == b"."
        return time.perf_counter() - started

    def close(self) -> None:
        self._socket.close()


class RawSocketSink:
    """The other end of `RawSocket`."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    @property
    def endpoint(self) -> str:
        return f"127.0.0.1:{self._listener.getsockname()[1]}"

    def _serve(self) -> None:
        into = memoryview(np.ones(256 * LAYOUT.block_bytes, np.uint8).data)
        peer, _ = self._listener.accept()
        with peer:
            while head := peer.recv(8, socket.MSG_WAITALL):
                left = into[: int.from_bytes(head, "little")]
                while left:
                    left = left[peer.recv_into(left, len(left), socket.MSG_WAITALL) :]
                peer.sendall(b".")

    def close(self) -> None:
        self._thread.join(LIMIT_S)
        self._listener.close()


class PoolEnd:
    """What runs inside either process."""

    def __init__(self, core: int, seed: int) -> None:
        os.sched_setaffinity(0, {core})
        self.memory = PoolMemory(LAYOUT, POOL_BLOCKS)
        np.frombuffer(self.memory.buffer, np.uint8).reshape(POOL_BLOCKS, -1)[:] = (
            (np.arange(POOL_BLOCKS) % 251).astype(np.uint8)[:, None] if seed else np.uint8(255)
        )
        self._ways: dict[str, Any] = {}

    def receive(self, kind: str) -> Any:
        """Makes the receiving side of a way; what the sender needs to reach it."""
        if kind in ("shm", "tcp"):
            receiver: Receiver = (ShmReceiver if kind == "shm" else TcpReceiver)(self.memory, Quiet())
            receiver.admit(ticket())
            self._ways[kind] = receiver
            return receiver.endpoint()
        if kind == "socket":
            self._ways[kind] = sink = RawSocketSink()
            return sink.endpoint
        from benchmarks.transfer.kv_nixl import NixlTarget

        self._ways[kind] = target = NixlTarget(kind)
        return target.metadata

    def send(self, kind: str, endpoint: Any) -> None:
        """Makes the sending side."""
        made: dict[str, Callable[[], TimedWay]] = {
            "copy": PlainCopy,
            "scattered": lambda: ScatteredCopy(self.memory, copy_runs),
            "streamed": lambda: ScatteredCopy(self.memory, best_copy()),
            "shm": lambda: Transported(ShmWriter(self.memory, "sender", best_copy()), endpoint),
            "tcp": lambda: Transported(TcpWriter(self.memory), endpoint),
            "socket": lambda: RawSocket(endpoint),
        }
        self._ways[kind] = made.get(kind, lambda: _nixl(kind, endpoint))()

    def run(self, kind: str, blocks: int) -> float:
        return float(self._ways[kind].run(blocks))

    def poll(self, kind: str, on: bool) -> None:
        """On the receiver of a way that needs it."""
        self._ways[kind].poll(on)

    def check(self, blocks: int) -> bool:
        """On the receiver: whether the first `blocks` have arrived whole; wipes them."""
        view = np.frombuffer(self.memory.buffer, np.uint8).reshape(POOL_BLOCKS, -1)
        right = all(bool((view[d] == s % 251).all()) for s, d in zip(*(p[:blocks] for p in plan()), strict=True))
        view[plan()[1]] = 255
        return right

    def close(self) -> None:
        for way in self._ways.values():
            way.close()


def best_copy() -> BlockCopy:
    """What a worker copies with on this machine."""
    try:
        return load().copy_blocks
    except NativeUnavailable:
        return copy_runs


def _nixl(kind: str, endpoint: Any) -> TimedWay:
    from benchmarks.transfer.kv_nixl import NixlInitiator

    return NixlInitiator(kind, endpoint)


class Remote:
    """A `PoolEnd` in a process, seen from outside."""

    def __init__(self, core: int, seed: int, environment: dict[str, str]) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, core, seed, environment))
        self._process.start()
        theirs.close()

    def call(self, name: str, *arguments: Any) -> Any:
        self._pipe.send((name, arguments))
        if not self._pipe.poll(LIMIT_S):
            raise TimeoutError(f"{name}{arguments} took more than {LIMIT_S:g} s")
        answer = self._pipe.recv()
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def close(self) -> None:
        with suppress(OSError):
            self._pipe.send(None)
        self._process.join(LIMIT_S)
        self._process.kill()


def _serve(pipe: Connection, core: int, seed: int, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    end = PoolEnd(core, seed)
    while (message := pipe.recv()) is not None:
        name, arguments = message
        try:
            pipe.send(getattr(end, name)(*arguments))
        except Exception as error:  # noqa: BLE001  # the caller gets it, whatever it is
            pipe.send(error)
    end.close()
