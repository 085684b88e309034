"""Addresses, channels and servers, with the settings that all our gRPC endpoints share."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from baton.errors import ConfigError
from baton.rpc.unreadable import RefuseUnreadable
from baton.v1 import admin_pb2, generation_pb2, transfer_pb2, worker_pb2

MESSAGE_LIMIT_BYTES = 64 * 1024 * 1024
"""gRPC's own limit; validation, which can name the field, holds requests to less."""
_RECEIVED = "grpc.max_receive_message_length"
OPTIONS: list[tuple[str, Any]] = [
    (_RECEIVED, MESSAGE_LIMIT_BYTES),
    ("grpc.max_send_message_length", MESSAGE_LIMIT_BYTES),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 2_000),
    ("grpc.http2.max_ping_strikes", 0),
    # Find a worker that comes back at once, not after gRPC's two-minute backoff.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    # A second process on the same port must fail, not take some of the connections.
    ("grpc.so_reuseport", 0),
    ("grpc.enable_http_proxy", 0),
]
WATCHFUL = [
    # A client that dies or freezes without a word is noticed after ten seconds, and its blocks are free again. gRPC has
    # two options for the answer to a ping, and waits for the longer one.
    ("grpc.keepalive_time_ms", 5_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
]
PATIENT = [
    # Between our processes heartbeats and leases judge, which know of their own absence; gRPC's timers do not. These
    # only end the connections of a host that is gone.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 60_000),
    ("grpc.http2.ping_timeout_ms", 60_000),
    ("grpc.keepalive_permit_without_calls", 1),
]
GENTLE = [
    # By its default a gRPC server allows a ping in five minutes, and ends the connection of a client that sends more.
    ("grpc.keepalive_time_ms", 310_000),
    ("grpc.keepalive_timeout_ms", 20_000),
]
LIVENESS, READINESS = "liveness", "readiness"
WILDCARDS = ("0.0.0.0", "::")


def parse_address(text: str, what: str = "address") -> tuple[str, int]:
    """`HOST:PORT`, with an IPv6 host in brackets. Raises ConfigError naming `what`."""
    host, separator, port = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if not separator or not host or not port.isdecimal() or int(port) > 65535 or (":" in host and not bracketed):
        raise ConfigError(f"{what}: expected HOST:PORT (an IPv6 host in brackets), not {text!r}")
    return host.strip("[]"), int(port)


def check_dialable(text: str, what: str) -> None:
    """Raises ConfigError, naming `what`, for an address that nobody can dial: a wildcard, port 0, or a name that
    does not resolve here."""
    host, port = parse_address(text, what)
    if host in WILDCARDS:
        raise ConfigError(f"{what}: {host} is every address of a machine; say which one others reach")
    if port == 0:
        raise ConfigError(f"{what}: {text} has port 0, where nothing listens; say which one others reach")
    try:
        socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        reason = (getattr(error, "strerror", None) or str(error)).lower()
        raise ConfigError(f"{what}: {host} does not resolve: {reason}") from None


def format_address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def open_channel(address: str) -> grpc.aio.Channel:
    """A channel between our processes. Its connection is its own; gRPC shares those to the same address by default."""
    return _channel(address, PATIENT)


def open_client_channel(address: str) -> grpc.aio.Channel:
    """A client's channel, also to servers behind others' proxies; its connection is its own too."""
    return _channel(address, GENTLE)


def _channel(address: str, keepalive: Sequence[tuple[str, Any]]) -> grpc.aio.Channel:
    options = [*OPTIONS, *keepalive, ("grpc.use_local_subchannel_pool", 1)]
    return grpc.aio.insecure_channel(address, options=options)


async def listens(address: str, timeout: float = 1.0) -> bool:
    """Whether connections are accepted there. False is certain (refused); a time-out counts as True."""
    host, port = parse_address(address)
    try:
        async with asyncio.timeout(timeout):
            _, writer = await asyncio.open_connection(host, port)
    except ConnectionRefusedError:
        return False
    except (TimeoutError, OSError, UnicodeError):
        return True
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    return True


@dataclass(frozen=True, slots=True)
class Service:
    """A servicer, the generated function that adds it to a server, and its full name."""

    add: Callable[[Any, grpc.aio.Server], None]
    servicer: object
    full_name: str


def service(add: Callable[[Any, grpc.aio.Server], None], servicer: object, name: str) -> Service:
    """`name` as in the proto, without the package."""
    for module in (generation_pb2, worker_pb2, transfer_pb2, admin_pb2):
        if name in module.DESCRIPTOR.services_by_name:
            return Service(add, servicer, module.DESCRIPTOR.services_by_name[name].full_name)
    raise AssertionError(f"no service {name}")


class Server:
    """A gRPC server with health and reflection. It is bound when made, so that a process knows its address early; it
    serves from `start` on."""

    def __init__(
        self, listen: str, *, for_clients: bool = False, receive_limit_bytes: int = MESSAGE_LIMIT_BYTES
    ) -> None:
        """Binds `listen` (port 0 for any); gRPC refuses longer messages than the limit. Raises ConfigError when the
        address is taken or not ours. `for_clients`: callers may die without a word, and have no heartbeat of ours."""
        host, port = parse_address(listen, "listen")
        _check_free(host, port)
        options = dict([*OPTIONS, *(WATCHFUL if for_clients else PATIENT)]) | {_RECEIVED: receive_limit_bytes}
        self._server = grpc.aio.server(options=[*options.items()], interceptors=[RefuseUnreadable()])
        try:
            bound = self._server.add_insecure_port(listen)
        except RuntimeError:
            raise ConfigError(f"cannot listen on {listen}: the address is in use or not available here") from None
        self.address = format_address(host, bound)
        self._health = health.aio.HealthServicer()
        self._names: list[str] = []

    async def start(self, services: Sequence[Service]) -> None:
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        for entry in services:
            entry.add(entry.servicer, self._server)
        self._names = [entry.full_name for entry in services]
        names = [*self._names, health.SERVICE_NAME, reflection.SERVICE_NAME]
        reflection.enable_server_reflection(names, self._server)
        await self._server.start()
        await self._health.set(LIVENESS, health_pb2.HealthCheckResponse.SERVING)
        await self.set_ready(False)

    async def set_ready(self, ready: bool) -> None:
        """Sets the health of ``, `readiness` and each service's name, which load balancers ask for."""
        state = health_pb2.HealthCheckResponse.SERVING if ready else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in ("", READINESS, *self._names):
            await self._health.set(name, state)

    async def stop(self, grace_s: float) -> None:
        """Refuses new calls at once, and ends those in progress after `grace_s`."""
        await self._server.stop(grace_s)


def _check_free(host: str, port: int) -> None:
    """Raises ConfigError with the reason, which gRPC writes only to its own log."""
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(where)
    except (OSError, UnicodeError) as error:  # the latter for a host that no name can be
        reason = (getattr(error, "strerror", None) or str(error)).lower()
        raise ConfigError(f"cannot listen on {format_address(host, port)}: {reason}") from None


@contextlib.asynccontextmanager
async def cancelling(*tasks: asyncio.Task[Any]) -> AsyncIterator[None]:
    """Cancels the tasks at the end of the block and waits for them."""
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
