"""A writer in a process of its own, told what to do by pickles on its standard input."""

from __future__ import annotations

import pickle
import sys
import time
from typing import Any

from baton.spec import ProcessRef
from kvtransfer.blocks.layout import KvLayout
from kvtransfer.blocks.memory import PoolMemory
from kvtransfer.transports.base import BlockMove, Transport
from kvtransfer.transports.nccl.double import DoubleDevice
from kvtransfer.transports.nccl.library import NcclDevice
from kvtransfer.transports.nccl.transport import NcclTransport
from kvtransfer.transports.nixl.transport import NixlTransport
from kvtransfer.transports.shm.transport import ShmTransport
from kvtransfer.transports.tcp.transport import TcpTransport
from tests.kvtransfer.transports.cuda_memory import CudaMemory
from tests.kvtransfer.transports.patterns import fill


def main() -> None:
    kind, incarnation, layout, blocks, seed = pickle.load(sys.stdin.buffer)
    assert isinstance(layout, KvLayout)
    memory = PoolMemory(layout, blocks, shared=False)
    fill(memory, seed)
    transport = _transport(kind, memory, incarnation)
    channel = None
    while True:
        try:
            verb, arguments = pickle.load(sys.stdin.buffer)
        except EOFError:
            break
        answer: Any = None
        try:
            if verb == "connect":
                endpoint, seconds = arguments
                channel = transport.connect(endpoint, ProcessRef("receiver", "r", ""), time.monotonic() + seconds)
            elif verb == "write":
                assert channel is not None
                ticket, moves, seconds = arguments
                answer = channel.write(ticket, [BlockMove(*m) for m in moves], time.monotonic() + seconds)
            elif verb == "hammer":
                assert channel is not None
                ticket, moves = arguments
                while True:  # until killed, or refused
                    channel.write(ticket, [BlockMove(*m) for m in moves], time.monotonic() + 60)
        except Exception as error:  # noqa: BLE001  # the test gets it, whatever it is
            answer = error
        pickle.dump(answer, sys.stdout.buffer)
        sys.stdout.buffer.flush()
    if channel is not None:
        channel.close()
    transport.close()
    memory.close()


def _transport(kind: str, memory: PoolMemory, incarnation: str) -> Transport:
    if kind == "shm":
        return ShmTransport(memory, incarnation, checksums=True)
    if kind == "nixl":
        return NixlTransport(memory, incarnation, checksums=True)
    if kind == "nccl":
        return NcclTransport(memory, incarnation, DoubleDevice())
    if kind == "nccl-cuda":
        return NcclTransport(CudaMemory(memory), incarnation, NcclDevice())
    return TcpTransport(memory, incarnation, checksums=True)


if __name__ == "__main__":
    main()
