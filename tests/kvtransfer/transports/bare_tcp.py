"""A TCP receiver, and bare sockets to it that send any bytes."""

from __future__ import annotations

import os
import socket
import time
import zlib

from baton.model import KvLayout
from baton.spec import HandoffKey, ProcessRef
from kvtransfer.blocks.memory import PoolMemory
from kvtransfer.handoffs.messages import Ticket
from kvtransfer.transports import wire
from kvtransfer.transports.sockets import split_endpoint
from kvtransfer.transports.tcp.receiver import TcpReceiver
from kvtransfer.transports.tcp.wire import HELLO, MAGIC, VERSION
from kvtransfer.transports.tcp.writer import TcpWriter
from tests.kvtransfer.transports.harness import GENEROUS, Recorder, host_and_port
from tests.kvtransfer.transports.patterns import fill

LAYOUT = KvLayout(layers=2, kv_heads=2, head_dim=32, dtype="float32")  # 16 KiB a block
SIZE = LAYOUT.block_bytes
PEER = ProcessRef("receiver", "r", "")


class Wire:
    """A receiver, a pool to write from, and bare sockets to it."""

    def __init__(self, stall_s: float = GENEROUS) -> None:
        self.events = Recorder()
        self.memory, self.source = PoolMemory(LAYOUT, 300), PoolMemory(LAYOUT, 300, shared=False)
        fill(self.source, 1)
        self.receiver = TcpReceiver(self.memory, self.events, checksums=True, stall_s=stall_s)
        self.writer = TcpWriter(self.source, checksums=True)
        self.open: list[socket.socket] = []

    def ticket(self, blocks: range = range(4)) -> Ticket:
        ticket = Ticket(HandoffKey(os.urandom(16), 1), 3, os.urandom(16), tuple(blocks), 0, "w")
        self.receiver.admit(ticket)
        return ticket

    @property
    def greeting(self) -> bytes:
        """A writer's first message."""
        token = split_endpoint(self.receiver.endpoint())[1]
        return HELLO.pack(MAGIC, VERSION, wire.Flags.CHECKSUMS, SIZE) + token

    def relayed(self, server: socket.socket) -> str:
        """The receiver's endpoint where a relay of the test stands before it."""
        token = self.receiver.endpoint().partition("#")[2]
        return f"127.0.0.1:{server.getsockname()[1]}#{token}"

    def bare(self, hello: bool = True) -> socket.socket:
        bare = socket.create_connection(host_and_port(self.receiver), timeout=GENEROUS)
        self.open.append(bare)
        if hello:
            bare.sendall(self.greeting)
            assert len(exactly(bare, HELLO.size)) == HELLO.size
        return bare

    def close(self) -> None:
        for bare in self.open:
            bare.close()
        self.receiver.close()
        self.writer.close()
        self.memory.close()
        self.source.close()


def soon() -> float:
    return time.monotonic() + GENEROUS


def batch(ticket: Ticket, data: bytes, index: int = 0, checksum: int | None = None) -> bytes:
    checksum = zlib.crc32(data) if checksum is None else checksum
    return wire.pack_batch(ticket, [wire.BlockEntry(index, ticket.blocks[index], checksum)]) + data


def exactly(bare: socket.socket, size: int) -> bytes:
    """`size` bytes, or fewer where the connection ends. (MSG_WAITALL does not wait on a socket with a time-out.)"""
    data = b""
    while len(data) < size and (piece := bare.recv(size - len(data))):
        data += piece
    return data


def ends(bare: socket.socket) -> bool:
    try:
        return bare.recv(1) == b""
    except ConnectionResetError:
        return True
