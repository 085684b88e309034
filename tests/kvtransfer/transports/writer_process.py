"""A writer in a process of its own, told what to do by pickles on its standard input."""

from __future__ import annotations

import pickle
import sys
import time
from typing import Any

from baton.model import KvLayout
from baton.spec import ProcessRef
from kvtransfer.blocks.memory import PoolMemory
from kvtransfer.handoffs.messages import BlockMove
from kvtransfer.transports.base import Writer
from kvtransfer.transports.nccl.double import DoubleDevice
from kvtransfer.transports.nccl.issuer import Issuer
from kvtransfer.transports.nccl.library import NcclDevice
from kvtransfer.transports.nccl.writer import NcclWriter
from kvtransfer.transports.nixl.writer import NixlWriter
from kvtransfer.transports.shm.writer import ShmWriter
from kvtransfer.transports.tcp.writer import TcpWriter
from tests.kvtransfer.transports.cuda_memory import CudaMemory
from tests.kvtransfer.transports.patterns import fill


def main() -> None:
    kind, incarnation, layout, blocks, seed = pickle.load(sys.stdin.buffer)
    assert isinstance(layout, KvLayout)
    memory = PoolMemory(layout, blocks, shared=False)
    fill(memory, seed)
    writer = _writer(kind, memory, incarnation)
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
                channel = writer.connect(endpoint, ProcessRef("receiver", "r", ""), time.monotonic() + seconds)
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
    writer.close()
    if isinstance(writer, NcclWriter):
        writer.issuer.close()
    memory.close()


def _writer(kind: str, memory: PoolMemory, incarnation: str) -> Writer:
    if kind == "shm":
        return ShmWriter(memory, incarnation, checksums=True)
    if kind == "nixl":
        return NixlWriter(memory, incarnation, checksums=True)
    if kind == "nccl":
        return NcclWriter(memory, incarnation, Issuer(DoubleDevice()))
    if kind == "nccl-cuda":
        return NcclWriter(CudaMemory(memory), incarnation, Issuer(NcclDevice()))
    return TcpWriter(memory, checksums=True)


if __name__ == "__main__":
    main()
