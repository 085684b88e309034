"""One worker in the test's process: a real role behind a real gRPC server, over a real transport or the double."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from baton.cost import CostModel
from baton.identity import mint_process
from baton.model import KvLayout
from baton.rpc.net import Server, service
from baton.spec import ProcessRef
from baton.telemetry import Counts
from baton.v1 import transfer_pb2, transfer_pb2_grpc, worker_pb2_grpc
from baton.worker.cache_events import CacheEvents
from baton.worker.handshake import handshake_of
from baton.worker.service import WorkerService
from decode_worker.service import DecodeRole
from decode_worker.transfer import TransferService
from decode_worker.writer_streams import WriterStreams
from kvtransfer.blocks.memory import PoolMemory
from kvtransfer.blocks.pool import BlockPool
from kvtransfer.handoffs.outcomes import LedgerLimits
from kvtransfer.transports.base import Receiver, ReceiverEvents, Writer
from kvtransfer.transports.memory import MemoryNetwork, MemoryReceiver, MemoryWriter
from kvtransfer.transports.shm.receiver import ShmReceiver
from kvtransfer.transports.shm.writer import ShmWriter
from kvtransfer.transports.tcp.receiver import TcpReceiver
from kvtransfer.transports.tcp.writer import TcpWriter
from prefill_worker.service import PrefillRole
from tests.roles.counting import LAYOUT, CountingEngine

EXPIRE_EVERY_S = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Of one worker. The kind `auto` is what `--transport auto` offers."""

    kind: str = "memory"
    host: str = "127.0.0.1"
    blocks: int = 64
    chunk_tokens: int = 32
    max_ungranted: int = 4
    handoff_deadline_s: float = 20.0
    lease_s: float = 10.0
    max_sequences: int = 8
    fingerprint: str = "f" * 32
    layout: KvLayout = LAYOUT

    @property
    def kinds(self) -> tuple[str, ...]:
        """Best first."""
        return ("shm", "tcp") if self.kind == "auto" else (self.kind,)


class Node:
    """What both roles have in common."""

    role: PrefillRole | DecodeRole
    transport: Receiver | Writer
    """The best one."""
    others: Sequence[Receiver | Writer] = ()

    def __init__(self, name: str, network: MemoryNetwork, settings: Settings) -> None:
        self.name, self.network, self.settings = name, network, settings
        self._server: Server | None = Server(f"{settings.host}:0")
        self.process = mint_process("worker", self._server.address, name)
        self.memory = PoolMemory(settings.layout, settings.blocks, shared="shm" in settings.kinds)
        self.pool = BlockPool(settings.blocks)
        self.engine = CountingEngine(self.memory)
        self.counts = Counts()
        self.worker = WorkerService(self.process, {}, self.counts)
        self._expiry: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Serves."""
        services = [service(worker_pb2_grpc.add_WorkerServicer_to_server, self.worker, "Worker")]
        assert self._server is not None, "started once"
        await self._server.start([*services, *self.compose()])
        self.worker.add_handler(self.role)
        self.worker.add_handler(CacheEvents(self.pool, self.counts))
        self._expiry = asyncio.create_task(self._expire(), name=f"expiry of {self.name}")

    def compose(self) -> list[Any]:
        """Makes the role; returns further services."""
        raise NotImplementedError

    def count(self, name: str) -> int:
        """How often something happened."""
        return self.counts.snapshot().get(name, 0)

    def busy(self) -> dict[str, int]:
        """What it holds, apart from memories of what is over."""
        statistics = self.pool.statistics()
        live = {name: count for name, count in self.role.live.items() if "tombstones" not in name and name != "senders"}
        held = {"held": statistics.held, "quarantined": statistics.quarantined}
        return {name: count for name, count in (live | held).items() if count}

    def check(self) -> None:
        """Whether its books balance."""
        self.pool.check_integrity()
        assert self.engine.corrupt == []
        assert self.count("commands_failed") == 0

    async def die(self) -> None:
        """What others see when its process is killed."""
        if self._server is not None:
            server, self._server = self._server, None
            await server.stop(0)
        self.close_transports()

    async def stop(self) -> None:
        """Ends it in order."""
        self.engine.gate.set()
        self.worker.close()
        if self._expiry is not None:
            self._expiry.cancel()
        if self._server is not None:
            await self._server.stop(0)
        await self.role.stop()
        self.close_transports()
        self.engine.close()
        self.memory.close()

    def close_transports(self) -> None:
        """All of them."""
        for transport in (self.transport, *self.others):
            transport.close()

    async def _expire(self) -> None:
        while True:
            await asyncio.sleep(EXPIRE_EVERY_S)
            self.role.expire()


class PrefillNode(Node):
    """A prefill worker. `says` replaces fields of its handshake."""

    role: PrefillRole
    transport: Writer

    def __init__(self, name: str, network: MemoryNetwork, settings: Settings) -> None:
        super().__init__(name, network, settings)
        self._handshake = transfer_pb2.HandshakeRequest()

    def compose(self) -> list[Any]:
        settings = self.settings
        self.says()
        writers = {kind: self.writer(kind) for kind in settings.kinds}
        self.transport, *self.others = writers.values()
        self.role = PrefillRole(
            engine=self.engine,
            pool=self.pool,
            fingerprint=settings.fingerprint,
            writers=writers,
            handshake=self._handshake,
            chunk_tokens=settings.chunk_tokens,
            max_ungranted=settings.max_ungranted,
            handoff_deadline_s=settings.handoff_deadline_s,
            worker=self.worker,
            counts=self.counts,
            model=CostModel(),
        )
        return []

    def writer(self, kind: str) -> Writer:
        """What it writes with."""
        incarnation = self.process.incarnation
        if kind == "shm":
            return ShmWriter(self.memory, incarnation)
        if kind == "tcp":
            return TcpWriter(self.memory, checksums=True)
        return MemoryWriter(self.memory, incarnation, self.network)

    def says(self, **fields: Any) -> None:
        """What it tells decode workers from the next handshake on; what is not given is the truth."""
        self._handshake.CopyFrom(
            handshake_of(
                self.process, self.settings.fingerprint, self.settings.layout, self.settings.kinds, checksums=True
            )
        )
        for name in fields:
            self._handshake.ClearField(name)  # type: ignore[arg-type]
        self._handshake.MergeFrom(transfer_pb2.HandshakeRequest(**fields))


class DecodeNode(Node):
    """A decode worker."""

    role: DecodeRole
    transport: Receiver
    transfer: TransferService
    streams: WriterStreams

    def compose(self) -> list[Any]:
        settings = self.settings
        self.streams = WriterStreams()
        self.role = DecodeRole(
            engine=self.engine,
            pool=self.pool,
            fingerprint=settings.fingerprint,
            writers=self.streams,
            make_receivers=self._receivers,
            limits=LedgerLimits(lease_s=settings.lease_s),
            max_sequences=settings.max_sequences,
            chunk_tokens=settings.chunk_tokens,
            worker=self.worker,
            counts=self.counts,
            model=CostModel(),
        )
        self.transfer = TransferService(
            self.role, self.streams, self.worker, self.process, settings.lease_s, self.counts, True
        )
        return [service(transfer_pb2_grpc.add_TransferServicer_to_server, self.transfer, "Transfer")]

    def receiver(self, events: ReceiverEvents, kind: str) -> Receiver:
        """Where it is written to."""
        if kind == "shm":
            return ShmReceiver(self.memory, events)
        if kind == "tcp":
            return TcpReceiver(self.memory, events, host=self.settings.host, checksums=True)
        return MemoryReceiver(self.memory, events, self.process.incarnation, self.network)

    def check(self) -> None:
        super().check()
        self.role.ledger.check_integrity()

    def break_control_streams(self) -> None:
        """The control streams of all writers end; the process stays."""
        self.streams.end()

    def _receivers(self, events: ReceiverEvents) -> dict[str, Receiver]:
        receivers = {kind: self.receiver(events, kind) for kind in self.settings.kinds}
        self.transport, *self.others = receivers.values()
        return receivers


def stranger(name: str = "stranger") -> ProcessRef:
    """A process that does not run."""
    return mint_process("worker", "127.0.0.1:1", name)
