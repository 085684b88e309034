"""All live requests: a slot for each, and the dispatch of the workers' messages to them.

A message about an attempt that is over or was never known is dropped and counted. A fault in one request ends that one
and no other.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import structlog

from baton.errors import BatonError, Internal, InvalidArgument, ResourceExhausted
from baton.messages import (
    CacheUpdate,
    Ended,
    Event,
    Freed,
    HandoffDone,
    HandoffFailed,
    HandoffWaiting,
    LoadReport,
    Preempted,
    PrefillReport,
    Started,
    Tokens,
)
from baton.spec import AttemptKey
from baton.telemetry import Counts
from router.requests.admitted import Admitted
from router.requests.attempts import Attempts
from router.requests.commands import Commands, late
from router.requests.failover import Failovers
from router.requests.placer import Placer
from router.requests.request import Request, RequestState
from router.requests.stream import ClientStream
from router.workers.worker import Worker

FULL_RETRY_S = 1.0
log = structlog.get_logger(__name__)


class Requests:
    """The table of live requests. Lives on one event loop."""

    def __init__(self, max_requests: int, placer: Placer, counts: Counts) -> None:
        self.placer, self.commands = placer, Commands(counts)
        self._max, self._counts = max_requests, counts
        self._labels: set[tuple[str, str]] = set()
        self._live: dict[AttemptKey, Request] = {}
        self._failovers = Failovers()
        self._refusing: BatonError | None = None
        self._handlers: dict[type, Callable[[Worker, Any], None]] = {
            Tokens: self._on_tokens,
            Started: partial(self._tell, "started", Request.on_started),
            HandoffFailed: partial(self._tell, "handoff_failed", Request.on_handoff_failed),
            HandoffWaiting: partial(self._tell, "handoff_waiting", Request.on_handoff_waiting),
            Preempted: partial(self._tell, "preempted", Request.on_preempted),
            HandoffDone: partial(self._tell, "resident", Request.on_handed_over),
            Ended: partial(self._tell, "ended", Request.on_ended),
            PrefillReport: self._on_report,
            Freed: self._on_freed,
            LoadReport: lambda worker, message: worker.reported(message),
            CacheUpdate: placer.prefixes.on_update,
        }

    def live(self) -> dict[str, int]:
        """Counts of objects by name."""
        return {
            "requests": len(self._labels),
            "attempts": len(self._live),
            "cancelling": len(self.commands.cancelling),
            "unbound": self.placer.unbound,
        }

    @contextlib.contextmanager
    def slot(self, tenant_salt: str, request_id: str) -> Iterator[str]:
        """A slot under a label that no other request of the tenant has; yields the label, minted if empty. Raises
        ResourceExhausted when all slots are taken, InvalidArgument when the label is."""
        if self._refusing is not None:
            raise self._refusing
        if len(self._labels) >= self._max:
            self._counts.add("requests_refused")
            raise ResourceExhausted(f"{self._max} requests are in the system", FULL_RETRY_S, "max_requests")
        label = (tenant_salt, request_id or str(uuid.uuid4()))
        if label in self._labels:
            raise InvalidArgument("request_id", f"{request_id!r} is in progress already")
        self._labels.add(label)
        try:
            yield label[1]
        finally:
            self._labels.discard(label)

    @contextlib.contextmanager
    def running(self, admitted: Admitted, stream: ClientStream) -> Iterator[Request]:
        """Places the prompt and sends it; at the end cancels a request that is not over. Raises as `Placer.place`."""
        if self._refusing is not None:
            raise self._refusing
        try:
            attempts = Attempts(admitted, self.placer, self.commands, self._counts)
        except BatonError:
            self._counts.add("requests_refused")
            raise
        request = self._live[attempts.current.key] = Request(admitted, attempts, self._failovers, stream, self._counts)
        attempts.renamed = self._renamed
        self._counts.add("requests")
        try:
            request.start()
            yield request
        finally:
            request.cancel("the client went away")
            del self._live[request.attempt.key]

    def refuse_all(self, error: BatonError) -> None:
        """Ends all requests, and refuses later ones, with this error."""
        self._refusing = error
        for request in list(self._live.values()):
            request.fail(error)

    def on_event(self, worker: Worker, event: Event | None) -> None:
        """None is a message of a kind that only newer workers know."""
        if event is None:
            self._counts.add("unknown_frames")
        else:
            self._handlers[type(event)](worker, event)

    def on_lost(self, worker: Worker, reason: str) -> None:
        """Ends or rebinds the requests on the worker."""
        self.placer.prefixes.on_lost(worker)
        for attempt in list(self._live):
            self._act(attempt, Request.on_lost, worker, reason)
        self.commands.lost(worker)

    def _renamed(self, former: AttemptKey, new: AttemptKey) -> None:
        self._live[new] = self._live.pop(former)

    def on_stalled(self, worker: Worker, reason: str) -> None:
        """Moves the requests on the worker, each in its turn, while the worker does not move."""
        for request in self._live.values():
            if request.attempt.needs(worker):
                spec = request.admitted.spec
                move = partial(request.leave, worker, reason)
                self._failovers.add(spec.priority, request.admitted.arrived, move)

    def _on_tokens(self, worker: Worker, message: Tokens) -> None:
        for run in message.runs:
            if not self._act(run.attempt, Request.on_tokens, worker, run):
                late(self._counts, "tokens")

    def _on_freed(self, worker: Worker, message: Freed) -> None:
        if not self.commands.freed(worker, message.attempt):
            late(self._counts, "freed")
        self._act(message.attempt, Request.on_freed, worker)

    def _on_report(self, worker: Worker, message: PrefillReport) -> None:
        self._act(message.attempt, Request.on_prefill_report, worker, message)  # after a stop string it is not late

    def _tell(self, kind: str, act: Callable[[Request, Worker, Any], None], worker: Worker, message: Any) -> None:
        if not self._act(message.attempt, act, worker, message):
            late(self._counts, kind)

    def _act(self, attempt: AttemptKey, act: Callable[..., None], *args: Any) -> bool:
        """Calls a method of the attempt's request and tells the request of a fault; False where it is over."""
        request = self._live.get(attempt)
        if request is None or request.state is RequestState.OVER:
            return False
        try:
            act(request, *args)
        except BatonError as error:
            request.fail(error)
        except Exception as error:
            log.error("unexpected error in a request", request_id=request.admitted.spec.request_id, exc_info=error)
            request.fail(Internal("internal error; the router's log has the details"), cut=True)
        return True
