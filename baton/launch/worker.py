"""One worker process: the model, the pool, the transports, its roles, and the services in front of them.

The only place that knows both roles. `run` reads from top to bottom: load, compose, serve, join, wait, leave.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Protocol

import structlog

from baton.config import WorkerConfig
from baton.cost import CostModel
from baton.errors import ConfigError
from baton.identity import host_id, mint_process
from baton.launch.transports import check_device, device_issuer, receivers, writers
from baton.launch.worker_admin import Sizes, WorkerAdmin
from baton.launch.worker_load import Loaded, claim_cpus, load
from baton.rpc import collector
from baton.rpc.convert import process_to_wire
from baton.rpc.net import Server, Service, parse_address, service, start_server
from baton.spec import ProcessRef
from baton.telemetry import Counts
from baton.v1 import admin_pb2, admin_pb2_grpc, transfer_pb2, transfer_pb2_grpc, worker_pb2, worker_pb2_grpc
from baton.worker.cache_events import CacheEvents
from baton.worker.registration import Registration
from baton.worker.runner import Runner
from baton.worker.service import RoleHandler, WorkerService, artifact_table
from baton.worker.wire import layout_to_wire
from decode_worker.events import LoopEvents
from decode_worker.service import DecodeRole
from decode_worker.transfer_service import PROTOCOL_VERSION, TransferService
from kvtransfer.blocks.pool import BlockPool
from kvtransfer.handoffs.outcomes import LedgerLimits
from kvtransfer.transports.base import Receiver, Writer
from kvtransfer.transports.nccl.issuer import Issuer
from prefill_worker.service import PrefillRole

EXPIRE_EVERY_S = 0.25
STOP_GRACE_S = 1.0
WILDCARDS = ("0.0.0.0", "::")
HANDOFF_LIMIT_S = 600.0
"""The longest a decode worker waits for a sequence that it granted room for; its writer renews the lease meanwhile."""
ROLES = {"prefill": worker_pb2.ROLE_PREFILL, "decode": worker_pb2.ROLE_DECODE}
log = structlog.get_logger(__name__)


class Role(RoleHandler, Protocol):
    """What both roles have beside their commands."""

    runner: Runner

    @property
    def live(self) -> dict[str, int]:
        """What it holds."""

    def expire(self) -> None:
        """Gives up what has run out."""

    async def stop(self) -> None:
        """Ends its threads."""


@dataclass(slots=True)
class Parts:
    """What a worker is made of."""

    config: WorkerConfig
    loaded: Loaded
    pool: BlockPool
    process: ProcessRef
    worker: WorkerService
    counts: Counts
    issuer: Issuer | None = field(init=False)
    receivers: dict[str, Receiver] = field(default_factory=dict)
    writers: dict[str, Writer] = field(default_factory=dict)
    roles: list[Role] = field(default_factory=list)
    transfer: TransferService | None = None
    check_books: Callable[[], None] = field(init=False)

    def __post_init__(self) -> None:
        self.check_books = self.pool.check_integrity
        self.issuer = device_issuer(self.config, self.loaded.memory)

    def current_process(self) -> ProcessRef:
        """Its address is known once the server listens."""
        return self.process

    def live(self) -> dict[str, int]:
        """What the roles hold, together."""
        return {"sessions": len(self.worker.sessions)} | {k: v for role in self.roles for k, v in role.live.items()}

    def pairs(self) -> list[admin_pb2.Pair]:
        """Decode workers that its prefill role is connected to."""
        return [pair for role in self.roles if isinstance(role, PrefillRole) for pair in role.senders.pairs()]


async def run(config: WorkerConfig, *, on_ready: Callable[[str], None], stop: asyncio.Event) -> None:
    """Serves until `stop`. `on_ready` gets the address once a router is attached.

    Raises ConfigError or Mismatch when the worker can't start or the router does not take it.
    """
    check_address(config)
    check_device(config)
    claim_cpus(config)
    loaded = await asyncio.to_thread(load, config)
    process = mint_process("-".join(sorted(config.roles)), config.listen, config.name)
    parts = _parts(config, loaded, process)
    try:
        services = _compose(parts)
        server = await start_server(config.listen, services)
        parts.process = replace(parts.process, address=config.advertise or server.address)
        collector.settle()
        await _serve(parts, server, on_ready, stop)
    finally:
        for receiver in parts.receivers.values():
            receiver.close()
        for writer in parts.writers.values():
            writer.close()
        if parts.issuer is not None:
            parts.issuer.close()


def check_address(config: WorkerConfig) -> None:
    """Raises ConfigError where nobody could dial the worker back."""
    host, _ = parse_address(config.listen, "listen")
    if config.advertise:
        parse_address(config.advertise, "advertise")
    elif host in WILDCARDS:
        raise ConfigError(f"advertise: needed with listen on {host}: where others reach this worker, as HOST:PORT")


async def _serve(parts: Parts, server: Server, on_ready: Callable[[str], None], stop: asyncio.Event) -> None:
    registration = Registration(
        parts.config.router, lambda: _register_request(parts), lambda router: log.debug("router", name=router.name)
    )
    joined = asyncio.create_task(registration.run(stop), name="registration")
    expiry = asyncio.create_task(_expire(parts), name="expiry")
    announce = asyncio.create_task(_announce(parts, server, on_ready), name="announce")
    try:
        # Registration ends with `stop`; the others never do. Whichever raises ends the worker, and says why.
        done, _ = await asyncio.wait((joined, expiry, announce), return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in (expiry, announce, joined):
            task.cancel()
        await asyncio.gather(expiry, announce, joined, return_exceptions=True)
        await server.set_ready(False)
        parts.worker.close()
        if parts.transfer is not None:
            parts.transfer.close()
        await server.stop(STOP_GRACE_S)
        for role in parts.roles:
            await role.stop()


async def _announce(parts: Parts, server: Server, on_ready: Callable[[str], None]) -> None:
    """Ready while a router is attached."""
    await parts.worker.attached.wait()
    on_ready(server.address)
    while True:
        await server.set_ready(True)
        await parts.worker.detached.wait()
        await server.set_ready(False)
        await parts.worker.attached.wait()


async def _expire(parts: Parts) -> None:
    """Leases end within a fraction of a second of their deadline."""
    while True:
        await asyncio.sleep(EXPIRE_EVERY_S)
        for role in parts.roles:
            role.expire()


def _parts(config: WorkerConfig, loaded: Loaded, process: ProcessRef) -> Parts:
    counts = Counts()
    holder: list[Parts] = []
    card = loaded.card
    artifacts = artifact_table(card.tokenizer_json, card.chat_template.encode())
    worker = WorkerService(lambda: holder[0].process, artifacts, counts)
    parts = Parts(config, loaded, BlockPool(loaded.memory.blocks), process, worker, counts)
    holder.append(parts)
    return parts


def _compose(parts: Parts) -> list[Service]:
    """Makes the roles, and the services that this worker's roles need."""
    config, loaded, counts = parts.config, parts.loaded, parts.counts
    services = [service(worker_pb2_grpc.add_WorkerServicer_to_server, parts.worker, "Worker")]
    if "decode" in config.roles:
        events = LoopEvents()
        parts.receivers = receivers(config, loaded.memory, events, parts.issuer)
        decode = DecodeRole(
            engine=loaded.engine,
            pool=parts.pool,
            fingerprint=loaded.card.fingerprint,
            transports=parts.receivers,
            limits=LedgerLimits(lease_s=config.lease_s, handoff_s=HANDOFF_LIMIT_S, tombstone_s=HANDOFF_LIMIT_S),
            max_sequences=config.max_sequences,
            chunk_tokens=config.chunk_tokens,
            tpot_budget_s=config.tpot_budget_ms / 1e3 or None,
            worker=parts.worker,
            counts=counts,
            model=CostModel(loaded.measured),
        )
        events.deliver_to(decode)
        transfer = TransferService(
            decode, parts.current_process, config.lease_s, counts, config.checksums, config.tcp_tls
        )
        parts.transfer, parts.check_books = transfer, decode.ledger.check_integrity
        services.append(service(transfer_pb2_grpc.add_TransferServicer_to_server, transfer, "Transfer"))
        parts.roles.append(decode)
    if "prefill" in config.roles:
        parts.writers = writers(config, loaded.memory, parts.process.incarnation, parts.issuer)
        prefill = PrefillRole(
            engine=loaded.engine,
            pool=parts.pool,
            fingerprint=loaded.card.fingerprint,
            transports=parts.writers,
            handshake=lambda: _handshake(parts),
            chunk_tokens=config.chunk_tokens,
            max_ungranted=config.max_ungranted,
            handoff_deadline_s=config.handoff_deadline_s,
            worker=parts.worker,
            counts=counts,
            model=CostModel(loaded.measured),
        )
        parts.roles.append(prefill)
    for role in parts.roles:
        role.runner.stand_back(config.compute_nice)
        parts.worker.add_handler(role)
    parts.worker.add_handler(CacheEvents(parts.pool, counts))
    kinds = [ROLES[name] for name in sorted(config.roles)]
    sizes = Sizes(loaded.memory.bytes, loaded.weight_bytes)
    admin = WorkerAdmin(
        parts.current_process, kinds, parts.pool, sizes, parts.live, parts.check_books, counts, parts.pairs
    )
    services.append(service(admin_pb2_grpc.add_AdminServicer_to_server, admin, "Admin"))
    return services


def _handshake(parts: Parts) -> transfer_pb2.HandshakeRequest:
    return transfer_pb2.HandshakeRequest(
        process=process_to_wire(parts.process),
        version_min=PROTOCOL_VERSION,
        version_max=PROTOCOL_VERSION,
        fingerprint=parts.loaded.card.fingerprint,
        kv_layout=layout_to_wire(parts.loaded.card.kv_layout),
        transports=list(parts.writers),
        host=host_id(),
        checksums=parts.config.checksums,
        tcp_tls=parts.config.tcp_tls,
    )


def _register_request(parts: Parts) -> worker_pb2.RegisterRequest:
    card, config = parts.loaded.card, parts.config
    model = worker_pb2.ModelCard(
        name=card.name,
        fingerprint=card.fingerprint,
        context_tokens=card.context_tokens,
        vocabulary_size=card.vocabulary_size,
        eos_token_ids=card.eos_token_ids,
        tokenizer_sha256=_sha256(card.tokenizer_json),
        chat_template_sha256=_sha256(card.chat_template.encode()) if card.chat_template else "",
        kv_layout=layout_to_wire(card.kv_layout),
        bos_token_id=card.bos_token_id,
        bos_token=card.bos_token,
        eos_token=card.eos_token,
        simulated=card.simulated,
    )
    return worker_pb2.RegisterRequest(
        worker=process_to_wire(parts.process),
        roles=[ROLES[name] for name in sorted(config.roles)],
        model=model,
        capacity=worker_pb2.Capacity(blocks=parts.pool.blocks, max_sequences=config.max_sequences),
        transports=list(parts.receivers or parts.writers),
    )


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
