"""The router process: composes its parts, serves, and stops in order."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import structlog

from baton.config import RouterConfig
from baton.errors import Unavailable
from baton.identity import mint_process
from baton.rpc import collector, net
from baton.telemetry import Counts
from baton.v1.admin_pb2_grpc import add_AdminServicer_to_server
from baton.v1.worker_pb2_grpc import add_RegistryServicer_to_server
from router.admin import AdminService
from router.clients.parsing import REQUEST_LIMIT_BYTES
from router.clients.service import GenerationService, add_generation
from router.clients.text_queue import TextQueue
from router.requests.placer import Placer
from router.requests.table import Requests
from router.workers.pools import PoolWatch, serves
from router.workers.prefixes import Prefixes
from router.workers.registry import NO_WORKER_RETRY_S, Registry
from router.workers.service import RegistryService

STOP_GRACE_S = 2.0
"""How long calls may take to end once their requests have ended."""
FREED_S = 1.0
"""How long the workers may take to free the blocks of the ended requests."""
RECEIVE_LIMIT_BYTES = 2 * REQUEST_LIMIT_BYTES
"""Up to here the answer names the field. Beyond it gRPC refuses, in threads of its own: 30 MB that come into Python
hold the event loop for 0.1 s."""
log = structlog.get_logger(__name__)


class Router:
    """All parts of a router. `start` once, then `stop`."""

    def __init__(self, config: RouterConfig) -> None:
        """Binds its address. Raises ConfigError when that can't be used."""
        self.config, self.counts = config, Counts()
        self._server = net.Server(config.listen, for_clients=True, receive_limit_bytes=RECEIVE_LIMIT_BYTES)
        self.process = mint_process("router", self._server.address, config.name)
        self.executor = ThreadPoolExecutor(1, "languages")
        self.texts = TextQueue(self.counts)
        prefixes = Prefixes(config.prefix_index_blocks, self.counts)
        self.placer = Placer(config.path, prefixes, self.counts, explained=config.explained_requests)
        self.requests = Requests(config.max_requests, self.placer, self.counts)
        self._changed = asyncio.Event()
        self.registry = Registry(
            self.process,
            config.lease_s,
            self.executor,
            self.counts,
            on_joined=self.placer.prefixes.on_joined,
            on_event=self.requests.on_event,
            on_lost=self.requests.on_lost,
            on_stalled=self.requests.on_stalled,
            on_change=self._changed.set,
        )
        self._pools = PoolWatch(config.path, self.registry.models)
        self._stopped = False
        self._readiness: asyncio.Task[None] | None = None

    @property
    def ready(self) -> bool:
        """Whether some request for more than one token can be served."""
        return any(serves(self.config.path, model) for model in self.registry.models.values())

    async def start(self) -> None:
        """Serves at once; ready when workers have joined."""
        generation = GenerationService(self.config, self.process, self.registry, self.requests, self.texts)
        admin = AdminService(self.process, self.registry, self.requests, self.counts)
        services = [
            net.service(add_generation, generation, "Generation"),
            net.service(add_RegistryServicer_to_server, RegistryService(self.registry, self.process), "Registry"),
            net.service(add_AdminServicer_to_server, admin, "Admin"),
        ]
        await self._server.start(services)
        self._readiness = asyncio.create_task(self._follow_readiness(), name="readiness")

    async def stop(self) -> None:
        """Refuses new calls, ends running streams with UNAVAILABLE, leaves the workers, stops serving. Idempotent."""
        assert self._readiness is not None, "started before"
        if self._stopped:
            return
        self._stopped = True
        error = Unavailable("the router is shutting down", NO_WORKER_RETRY_S)
        self.requests.refuse_all(error)
        await self.texts.close(error)
        async with net.cancelling(self._readiness):
            await self._server.set_ready(False)
        self._pools.close()
        if not await self.requests.commands.wait_freed(FREED_S):
            log.warning("workers have not freed everything", **self.requests.live())
        await self.registry.close()
        await self._server.stop(STOP_GRACE_S)
        self.executor.shutdown(wait=False, cancel_futures=True)

    async def _follow_readiness(self) -> None:
        shown = False
        while True:
            await self._changed.wait()
            self._changed.clear()
            self._pools.changed()
            if self.ready != shown:
                shown = self.ready
                log.info("ready" if shown else "not ready: no model has the workers that requests need")
                await self._server.set_ready(shown)


async def run(config: RouterConfig, *, on_ready: Callable[[str], None], stop: asyncio.Event) -> None:
    """Serves until `stop` is set. `on_ready` gets the address as soon as it answers, before a worker has joined."""
    router = Router(config)
    await router.start()
    collector.settle()
    try:
        on_ready(router.process.address)
        await stop.wait()
    finally:
        await router.stop()
