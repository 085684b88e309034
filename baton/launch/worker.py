"""One worker process: the model, the pool, the transports, its roles, and the services in front of them.

The only place that knows both roles. `run` reads from top to bottom: load, bind, compose, serve, join, wait, leave.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import structlog

from baton.config import WorkerConfig
from baton.cost import CostModel
from baton.errors import ConfigError
from baton.identity import mint_process
from baton.launch.transports import check_device, device_issuer, receivers, writers
from baton.launch.worker_admin import Sizes, WorkerAdmin
from baton.launch.worker_load import Loaded, claim_cpus, load
from baton.messages import Pulse
from baton.rpc import awake, collector
from baton.rpc.convert import ROLES, card_to_wire, process_to_wire
from baton.rpc.greeting import with_versions
from baton.rpc.net import WILDCARDS, Server, Service, check_dialable, parse_address, service
from baton.spec import ProcessRef
from baton.telemetry import Counts
from baton.v1 import admin_pb2_grpc, transfer_pb2_grpc, worker_pb2, worker_pb2_grpc
from baton.worker.cache_events import CacheEvents
from baton.worker.handshake import handshake_of
from baton.worker.registration import Membership
from baton.worker.runner import Runner
from baton.worker.sending.senders import Senders
from baton.worker.service import RoleHandler, WorkerService
from decode_worker.service import DecodeRole
from decode_worker.transfer import TransferService
from decode_worker.writer_streams import WriterStreams
from kvtransfer.blocks.pool import BlockPool
from kvtransfer.handoffs.outcomes import LedgerLimits
from kvtransfer.transports.base import Receiver, ReceiverEvents, Writer
from kvtransfer.transports.nccl.issuer import Issuer
from prefill_worker.service import PrefillRole

EXPIRE_EVERY_S = 0.25
STOP_GRACE_S = 1.0
HANDOFF_LIMIT_S = 600.0
"""The longest a decode worker waits for a sequence that it granted room for; its writer renews the lease meanwhile."""
log = structlog.get_logger(__name__)


class Role(RoleHandler, Protocol):
    """A role's life, beside its commands. `live` counts the objects that it holds; `expire` ends overdue leases."""

    @property
    def runner(self) -> Runner: ...
    @property
    def live(self) -> dict[str, int]: ...
    @property
    def pulse(self) -> Pulse | None: ...
    def expire(self) -> None: ...
    async def stop(self) -> None: ...


@dataclass(slots=True)
class Parts:
    config: WorkerConfig
    loaded: Loaded
    process: ProcessRef
    counts: Counts
    pool: BlockPool
    worker: WorkerService
    streams: WriterStreams = field(default_factory=WriterStreams)
    issuer: Issuer | None = None
    receivers: dict[str, Receiver] = field(default_factory=dict)
    writers: dict[str, Writer] = field(default_factory=dict)
    roles: list[Role] = field(default_factory=list)
    senders: Senders | None = None

    def live(self) -> dict[str, int]:
        return {"sessions": len(self.worker.sessions)} | {k: v for role in self.roles for k, v in role.live.items()}


async def run(config: WorkerConfig, *, on_ready: Callable[[str], None], stop: asyncio.Event) -> None:
    """Serves until `stop`. `on_ready` gets the address once a router is attached.

    Raises ConfigError or Mismatch when the worker can't start or the router does not take it.
    """
    check_address(config)
    check_device(config)
    claim_cpus(config)
    loaded = await asyncio.to_thread(load, config)
    server = Server(config.listen)
    process = mint_process("-".join(sorted(config.roles)), config.advertise or server.address, config.name)
    counts, pool = Counts(), BlockPool(loaded.memory.blocks)
    worker = WorkerService(process, loaded.card.artifacts, counts, config.router_hold_s)
    parts = Parts(config, loaded, process, counts, pool, worker, issuer=device_issuer(config, loaded.memory))
    try:
        await server.start(_compose(parts))
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
    """Raises ConfigError where no router could dial the worker back, or no other worker its KV port."""
    host, _ = parse_address(config.listen, "listen")
    for name, value in (("advertise", config.advertise), ("tcp_advertise", config.tcp_advertise)):
        if value:
            check_dialable(value, name)
    if not config.advertise and host in WILDCARDS:
        raise ConfigError(f"advertise: needed with listen on {host}: where others reach this worker, as HOST:PORT")
    if parse_address(config.router, "router")[1] == 0:
        raise ConfigError(f"router: {config.router} has port 0, where nothing listens")


async def _serve(parts: Parts, server: Server, on_ready: Callable[[str], None], stop: asyncio.Event) -> None:
    membership = Membership(parts.config.router, _register_request(parts))
    tasks = [
        asyncio.create_task(membership.run(stop), name="registration"),
        asyncio.create_task(_expire(parts), name="expiry"),
        asyncio.create_task(_announce(parts, server, on_ready), name="announce"),
    ]
    try:
        # Registration ends with `stop`; the others never do. The first error ends the worker.
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await server.set_ready(False)
        parts.worker.close()
        parts.streams.end()
        await server.stop(STOP_GRACE_S)
        for role in parts.roles:
            await role.stop()


async def _announce(parts: Parts, server: Server, on_ready: Callable[[str], None]) -> None:
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
        if not awake.catching_up():
            for role in parts.roles:
                role.expire()


def _compose(parts: Parts) -> list[Service]:
    config, loaded, counts = parts.config, parts.loaded, parts.counts
    check_books = parts.pool.check_integrity
    services = [service(worker_pb2_grpc.add_WorkerServicer_to_server, parts.worker, "Worker")]
    if "decode" in config.roles:
        decode = _decode_role(parts)
        transfer = TransferService(
            decode, parts.streams, parts.worker, parts.process, config.lease_s, counts, config.checksums, config.tcp_tls
        )
        check_books = decode.ledger.check_integrity
        services.append(service(transfer_pb2_grpc.add_TransferServicer_to_server, transfer, "Transfer"))
        parts.roles.append(decode)
    if "prefill" in config.roles:
        prefill = _prefill_role(parts)
        parts.senders = prefill.senders
        parts.roles.append(prefill)
    parts.worker.pulse = lambda: next(filter(None, (role.pulse for role in parts.roles)), None)
    for role in parts.roles:
        role.runner.stand_back(config.compute_nice)
        parts.worker.add_handler(role)
    parts.worker.add_handler(CacheEvents(parts.pool, counts))
    sizes = Sizes(loaded.memory.bytes, loaded.weight_bytes)
    admin = WorkerAdmin(parts.process, config.roles, parts.pool, sizes, parts.live, check_books, counts, parts.senders)
    services.append(service(admin_pb2_grpc.add_AdminServicer_to_server, admin, "Admin"))
    return services


def _decode_role(parts: Parts) -> DecodeRole:
    config, loaded = parts.config, parts.loaded

    def make_receivers(events: ReceiverEvents) -> dict[str, Receiver]:
        parts.receivers = receivers(config, loaded.memory, events, parts.issuer)
        return parts.receivers

    return DecodeRole(
        engine=loaded.engine,
        pool=parts.pool,
        fingerprint=loaded.card.fingerprint,
        writers=parts.streams,
        make_receivers=make_receivers,
        limits=LedgerLimits(lease_s=config.lease_s, handoff_s=HANDOFF_LIMIT_S, tombstone_s=HANDOFF_LIMIT_S),
        max_sequences=config.max_sequences,
        chunk_tokens=config.chunk_tokens,
        tpot_budget_s=config.tpot_budget_ms / 1e3 or None,
        worker=parts.worker,
        counts=parts.counts,
        model=CostModel(loaded.measured),
    )


def _prefill_role(parts: Parts) -> PrefillRole:
    config, loaded, card = parts.config, parts.loaded, parts.loaded.card
    parts.writers = writers(config, loaded.memory, parts.process.incarnation, parts.issuer)
    handshake = handshake_of(
        parts.process,
        card.fingerprint,
        card.kv_layout,
        parts.writers,
        checksums=config.checksums,
        tcp_tls=config.tcp_tls,
    )
    return PrefillRole(
        engine=loaded.engine,
        pool=parts.pool,
        fingerprint=card.fingerprint,
        writers=parts.writers,
        handshake=handshake,
        chunk_tokens=config.chunk_tokens,
        max_ungranted=config.max_ungranted,
        handoff_deadline_s=config.handoff_deadline_s,
        worker=parts.worker,
        counts=parts.counts,
        model=CostModel(loaded.measured),
    )


def _register_request(parts: Parts) -> worker_pb2.RegisterRequest:
    card, config = parts.loaded.card, parts.config
    message = worker_pb2.RegisterRequest(
        worker=process_to_wire(parts.process),
        roles=[ROLES[name] for name in sorted(config.roles)],
        model=card_to_wire(card),
        capacity=worker_pb2.Capacity(blocks=parts.pool.blocks, max_sequences=config.max_sequences),
        transports=list(parts.receivers or parts.writers),
    )
    return with_versions(message)
