"""Requests whose attempt is over, on their way to another one.

A dead worker may leave a thousand streams. They are placed a few at a time, by priority and then age, so that the event
loop serves others in between; the workers' queues and ledgers pace the computing.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import Callable
from typing import Protocol

import structlog

from baton.errors import BatonError, Internal
from baton.spec import FinishReason, StopRule
from router.requests.admitted import Admitted
from router.requests.attempts import Attempts
from router.requests.failures import CopyLost
from router.requests.placer import Back
from router.workers.worker import Worker

log = structlog.get_logger(__name__)
AT_ONCE, PAUSE_S = 4, 0.002


class Failovers:
    """Calls back each request in its turn. Lives on one event loop."""

    def __init__(self) -> None:
        self._waiting: list[tuple[int, float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, priority: int, arrived: float, place: Callable[[], None]) -> None:
        """`place` must not raise."""
        heapq.heappush(self._waiting, (-priority, arrived, next(self._numbers), place))
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(0.0, self._some)

    def _some(self) -> None:
        self._timer = None
        for _ in range(min(AT_ONCE, len(self._waiting))):
            heapq.heappop(self._waiting)[-1]()
        if self._waiting:
            self._timer = asyncio.get_running_loop().call_later(PAUSE_S, self._some)


class Continuing(Protocol):
    """A request that may need another attempt."""

    admitted: Admitted
    attempts: Attempts

    @property
    def open(self) -> bool:
        """Whether tokens are still to come."""

    @property
    def ids(self) -> tuple[int, ...]:
        """The output so far."""

    def halted(self) -> None:
        """The current attempt is over, and the next one has not begun."""

    def continued(self) -> None:
        """Another attempt has begun."""

    def finish(self, reason: FinishReason) -> None: ...

    def fail(self, error: BatonError, *, cut: bool = False) -> None: ...


class Continuation:
    """How one request goes on when its attempt can't."""

    def __init__(self, request: Continuing, failovers: Failovers) -> None:
        self._request, self._failovers = request, failovers

    def lost(self, worker: Worker, reason: str) -> None:
        """A worker is lost. Raises the error that ends the request."""
        attempts = self._request.attempts
        try:
            attempts.lost(worker, reason)
        except CopyLost as error:
            attempts.retire(error)
            self._in_turn(str(error), error)

    def preempted(self, worker: Worker, cached_tokens: int) -> bool:
        """The worker needed its room; false where that is not news."""
        if not self._request.attempts.preempted(worker):
            return False
        why = f"preempted on {worker}"
        nowhere = CopyLost(f"{why}, and no worker is there to go on", 1.0, "decode_workers")
        self._in_turn(why, nowhere, Back(worker, cached_tokens))
        return True

    def leave(self, worker: Worker, why: str) -> None:
        """The worker does not move: goes on elsewhere, if that still is so and another one can take it."""
        request, attempts = self._request, self._request.attempts
        if attempts.exhausted:
            return
        others = all(request.admitted.model.usable(role) for role in worker.registration.roles)
        leaves = others and worker.link.watch.stalled and attempts.current.needs(worker)
        try:
            if leaves and not attempts.current.rebound(worker):
                self._start_next(f"{worker} stalled: {why}")
        except BatonError as error:
            log.info("not bound elsewhere", request_id=request.admitted.spec.request_id, why=str(error))

    def _in_turn(self, why: str, lost: CopyLost, back_at: Back | None = None) -> None:
        request = self._request
        request.halted()

        def go_on() -> None:
            if request.open:
                self._start_next(why, lost, back_at)

        self._failovers.add(request.admitted.spec.priority, request.admitted.arrived, go_on)

    def _start_next(self, why: str, lost: CopyLost | None = None, back_at: Back | None = None) -> None:
        """Where no other attempt can be made, the request ends with `lost`; without that the current one stays."""
        request, ids = self._request, self._request.ids
        spec = request.admitted.spec
        if ids and (reason := StopRule.of(spec).reason(ids[-1], len(ids))) is not None:
            return request.finish(reason)  # only the news of its end was lost
        try:
            request.attempts.start_next(ids, why, back_at)
        except BatonError as error:
            log.info("does not go on", request_id=spec.request_id, why=str(error))
            return None if lost is None else request.fail(lost)
        except Exception as error:
            log.error("unexpected error in a failover", request_id=spec.request_id, exc_info=error)
            return request.fail(Internal("internal error; the router's log has the details"), cut=True)
        return request.continued()
