"""Registers a worker with a router, and renews its lease until told to leave."""

from __future__ import annotations

import asyncio
import contextlib

import structlog

from baton import errors
from baton.rpc.net import open_channel
from baton.rpc.status import call
from baton.v1 import worker_pb2 as wire
from baton.v1.worker_pb2_grpc import RegistryStub

CALL_TIMEOUT_S = 2.0
BACKOFF_S = (0.1, 0.2, 0.5, 1.0)
TRANSIENT = (errors.Unavailable, errors.DeadlineExceeded, errors.Cancelled)
"""A router that is away, slow, or stops in the middle of a call."""
log = structlog.get_logger(__name__)


class Membership:
    """Keeps one worker registered with one router: sends `request` again when the router has forgotten the worker."""

    def __init__(self, router_address: str, request: wire.RegisterRequest) -> None:
        self._address, self._request = router_address, request

    async def run(self, stop: asyncio.Event) -> None:
        """Leaves and returns after `stop`. Raises Mismatch or InvalidArgument where the router refuses the worker, also
        later: when it finds another process at the worker's address."""
        channel = open_channel(self._address)
        stub: RegistryStub = RegistryStub(channel)
        try:
            while not stop.is_set():
                registered = await self._register(stub, stop)
                if registered is None:
                    return
                await self._renew_until_forgotten(stub, stop, *registered)
            await self._leave(stub)
        finally:
            await channel.close(0)

    async def _register(self, stub: RegistryStub, stop: asyncio.Event) -> tuple[float, str] | None:
        """The lease in seconds and the router's incarnation; None when `stop` came first."""
        attempt = 0
        while not stop.is_set():
            try:
                answer = await call(stub.Register(self._request), CALL_TIMEOUT_S)
            except TRANSIENT as error:
                if attempt % 20 == 0:
                    log.warning("waiting for the router", router=self._address, error=str(error))
                await _pause(stop, BACKOFF_S[min(attempt, len(BACKOFF_S) - 1)])
                attempt += 1
                continue
            version = answer.version or 1
            log.info("registered", router=answer.router.name, lease_ms=answer.lease_ms, version=version)
            return answer.lease_ms / 1e3, answer.router.incarnation
        return None

    async def _renew_until_forgotten(
        self, stub: RegistryStub, stop: asyncio.Event, lease_s: float, incarnation: str
    ) -> None:
        """A router that is briefly unreachable keeps the worker registered; one that restarted does not know it."""
        while not await _pause(stop, lease_s / 3):
            try:
                answer = await call(stub.Renew(wire.RenewRequest(worker=self._request.worker)), CALL_TIMEOUT_S)
            except errors.NotFound as error:
                log.warning("registering again", router=self._address, why=str(error))
                return
            except errors.InvalidArgument:
                raise
            except errors.BatonError as error:  # only the lease decides whether the worker is still known
                log.warning("lease not renewed", router=self._address, error=str(error))
                continue
            if answer.router.incarnation != incarnation:
                return

    async def _leave(self, stub: RegistryStub) -> None:
        with contextlib.suppress(errors.BatonError):  # the router may be gone already
            await call(stub.Deregister(wire.DeregisterRequest(worker=self._request.worker)), CALL_TIMEOUT_S)


async def _pause(stop: asyncio.Event, seconds: float) -> bool:
    """Waits so long or until `stop`. True in the latter case."""
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(stop.wait(), seconds)
    return stop.is_set()
