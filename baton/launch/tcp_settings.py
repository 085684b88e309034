"""The tcp transport as a worker's settings ask for it."""

from __future__ import annotations

from baton.config import WorkerConfig
from baton.rpc.net import parse_address
from kvtransfer.blocks.memory import PoolMemory
from kvtransfer.transports.base import ReceiverEvents
from kvtransfer.transports.tcp.stream import TlsContexts
from kvtransfer.transports.tcp.transport import TcpTransport


def tcp_transport(
    config: WorkerConfig,
    memory: PoolMemory,
    incarnation: str,
    events: ReceiverEvents | None,
    host: str,
    advertise: str | None,
) -> TcpTransport:
    """`host` and `advertise` are the worker's own, for where tcp has no settings of its own. Raises ConfigError."""
    port = advertise_port = 0
    if config.tcp_listen:
        host, port = parse_address(config.tcp_listen, "tcp_listen")
    if config.tcp_advertise:
        advertise, advertise_port = parse_address(config.tcp_advertise, "tcp_advertise")
    tls = TlsContexts.load(config.tcp_tls_cert, config.tcp_tls_key, config.tcp_tls_ca) if config.tcp_tls else None
    return TcpTransport(
        memory,
        incarnation,
        events,
        host=host,
        port=port,
        advertise=advertise,
        advertise_port=advertise_port,
        checksums=config.checksums,
        tls=tls,
        connections=config.tcp_connections,
    )
