"""A pair connects over real transports, some of which lead nowhere, or to another worker."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from baton.spec import RefusalReason
from baton.worker.sending import pair as module
from kvtransfer.blocks.memory import PoolMemory
from kvtransfer.transports.base import Writer
from kvtransfer.transports.shm.receiver import ShmReceiver
from kvtransfer.transports.shm.writer import ShmWriter
from kvtransfer.transports.tcp.receiver import TcpReceiver
from kvtransfer.transports.tcp.writer import TcpWriter
from tests.kvtransfer.transports.harness import LAYOUT, Recorder
from tests.worker.sending.pairs import bench


class Pools:
    """A writer of each kind, and receivers of two decode workers."""

    def __init__(self) -> None:
        self.source, self.memory, self.elsewhere = (PoolMemory(LAYOUT, 4) for _ in range(3))
        events = Recorder()
        self.shm = ShmReceiver(self.memory, events)
        self.tcp = TcpReceiver(self.memory, events)
        self.other = TcpReceiver(self.elsewhere, events)
        self.writers: dict[str, Writer] = {"shm": ShmWriter(self.source, "p-1"), "tcp": TcpWriter(self.source)}

    @property
    def misled(self) -> str:
        """Where a wrong `--tcp-advertise` leads: to the other worker."""
        return f"{self.other.endpoint().partition('#')[0]}#{self.tcp.endpoint().partition('#')[2]}"

    def close(self) -> None:
        for receiver in (self.shm, self.tcp, self.other):
            receiver.close()
        for memory in (self.source, self.memory, self.elsewhere):
            memory.close()


@pytest.fixture
def pools() -> Iterator[Pools]:
    made = Pools()
    yield made
    made.close()


@contextmanager
def unix_socket(then: Callable[[socket.socket], None] | None) -> Iterator[str]:
    """An shm endpoint that is no receiver: without `then` it does not answer."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind("\0" + (name := f"baton-test-{time.monotonic_ns()}"))
        listener.listen()

        def serve() -> None:
            accepted, _ = listener.accept()
            with accepted:
                if then is not None:
                    then(accepted)
                else:
                    accepted.recv(1000)
                    accepted.recv(1000)  # until the writer leaves

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"@{name}"
        finally:
            thread.join()


@pytest.mark.parametrize(
    ("then", "why"),
    [
        (lambda accepted: accepted.close(), "d0"),
        (lambda accepted: accepted.recv(1000), "d0 refused the connection"),
        (lambda accepted: (accepted.recv(1000), accepted.send(b"what?")), "d0 refused the connection"),
        (None, "d0 did not answer"),
    ],
)
async def test_shared_memory_that_can_not_be_had_gives_way_to_tcp(
    pools: Pools, then: Callable[[socket.socket], None] | None, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CONNECT_S", 2.0 if then else 0.8)
    with unix_socket(then) as address:
        async with bench(pools.writers, [("shm", address), ("tcp", pools.tcp.endpoint())]) as b:
            assert await b.up() == "tcp"
            assert b.stream.note.startswith(f"shm: {why}")


async def test_a_wrong_address_for_tcp_gives_way_to_what_works(pools: Pools) -> None:
    async with bench(pools.writers, [("tcp", pools.misled), ("shm", pools.shm.endpoint())]) as b:
        assert await b.up() == "shm"
        assert "tcp: d0 is not at 127.0.0.1:" in b.stream.note
        assert "another receiver answers there" in b.stream.note


async def test_a_wrong_address_for_tcp_is_named_where_nothing_else_works(pools: Pools) -> None:
    async with bench(pools.writers, [("shm", "@baton-nowhere"), ("tcp", pools.misled)]) as b:
        reason, message = await b.down()
        assert reason is RefusalReason.UNREACHABLE
        assert "shm: d0 at @baton-nowhere: [Errno 111] Connection refused; tcp: d0 is not at 127.0.0.1:" in message
        assert pools.tcp.endpoint().partition("#")[2] not in message
