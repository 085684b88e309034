"""All live requests: admits them, sends their commands, and gives each the frames that are about it.

The edge between the workers' protobuf frames and the state machines. A frame about an attempt that is over or was
never known is dropped and counted. A cancelled attempt stays in `cancelling` until every worker that was told has
answered Freed or is lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator

import structlog

from baton.errors import BatonError, Internal, InvalidArgument, ResourceExhausted
from baton.rpc.convert import logprobs_from_wire, process_to_wire, spec_to_wire
from baton.spec import AttemptKey, HandoffKey, SequenceSpec
from baton.telemetry import Counts
from baton.v1 import worker_pb2 as wire
from kvtransfer.blocks.prefix import Digests
from router.placement.offers import Way
from router.requests.frames import read_end, read_refusal, read_times
from router.requests.order import Choice, Order
from router.requests.placer import Placer
from router.requests.request import Request
from router.requests.streams import ClientStream
from router.workers.prefixes import Prefixes, digests_of
from router.workers.registry import ServedModel
from router.workers.worker import Worker

CANCELLING_LIMIT = 16_384
FULL_RETRY_S = 1.0
log = structlog.get_logger(__name__)


class Requests:
    """The table of live requests. Implements their `Port`."""

    def __init__(self, max_requests: int, counts: Counts, placer: Placer, prefix_blocks: int) -> None:
        self._max, self._counts, self._placer = max_requests, counts, placer
        self.prefixes = Prefixes(prefix_blocks, counts)
        self._labels: set[tuple[str, str]] = set()
        self._live: dict[AttemptKey, tuple[Request, ServedModel, Digests]] = {}
        self._cancelling: OrderedDict[AttemptKey, set[Worker]] = OrderedDict()
        self._all_freed = asyncio.Event()
        self._refusing: BatonError | None = None
        self._handlers: dict[str, Callable[[Worker, wire.WorkerFrame], None]] = {
            "started": self._on_started,
            "tokens": self._on_tokens,
            "handoff_failed": self._on_handoff_failed,
            "resident": self._on_resident,
            "prefill_report": self._on_prefill_report,
            "ended": self._on_ended,
            "freed": self._on_freed,
            "load": self._on_load,
            "cache_events": self.prefixes.on_frame,
        }

    def live(self) -> dict[str, int]:
        """How many objects there are, by name."""
        return {
            "requests": len(self._labels),
            "attempts": len(self._live),
            "cancelling": len(self._cancelling),
            "unbound": self._placer.unbound,
        }

    @contextlib.contextmanager
    def slot(self, tenant_salt: str, request_id: str) -> Iterator[str]:
        """A place in the system under a label that nobody else of the tenant has; yields the label, minted if empty.

        Raises ResourceExhausted when all places are taken, InvalidArgument when the label is.
        """
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

    def start(self, order: Order, model: ServedModel, stream: ClientStream) -> Request:
        """Places the prompt and sends it. Raises as `Placer.place`, at once."""
        if self._refusing is not None:
            raise self._refusing
        digests = digests_of(model.card, order.spec)
        try:
            cached = self.prefixes.cached_tokens(model.card, order.spec, digests)
            worker, plan = self._placer.place(order, model, cached)
        except BatonError:
            self._counts.add("requests_refused")
            raise
        request = Request(order, worker, stream, self, self._counts, plan)
        if plan.way is not Way.DIRECT and order.spec.max_tokens > 1:
            self._placer.placed(model, request.key, len(order.spec.prompt))
        self._live[request.key] = (request, model, digests)
        self._counts.add("requests")
        request.start()
        return request

    def refuse_all(self, error: BatonError) -> None:
        """Ends what runs, and refuses what comes, with this error."""
        self._refusing = error
        for request, *_ in list(self._live.values()):
            request.fail(error)

    async def wait_freed(self, timeout: float) -> bool:
        """Until every worker has answered every cancel; False when that takes longer than `timeout` seconds."""
        try:
            async with asyncio.timeout(timeout):
                while self._cancelling:
                    self._all_freed.clear()
                    await self._all_freed.wait()
        except TimeoutError:
            return False
        return True

    # What the workers say.

    def on_frame(self, worker: Worker, frame: wire.WorkerFrame) -> None:
        """One frame; a fault in handling it costs at most the request that it is about."""
        kind = frame.WhichOneof("body")
        handler = self._handlers.get(kind or "")
        if handler is None:
            self._counts.add("unknown_frames")  # a newer worker's
        else:
            handler(worker, frame)

    def on_lost(self, worker: Worker, reason: str) -> None:
        """Ends or rebinds what was on it."""
        self.prefixes.on_lost(worker)
        for request, *_ in list(self._live.values()):
            with self._guarded(request):
                request.on_lost(worker, reason)
        for attempt in list(self._cancelling):
            self._acknowledge(attempt, worker)

    def _on_started(self, worker: Worker, frame: wire.WorkerFrame) -> None:
        message = frame.started
        with self._about(message.attempt, "started") as request:
            if request is not None:
                request.on_started(worker, message.queue_ms, message.cached_tokens)

    def _on_tokens(self, worker: Worker, frame: wire.WorkerFrame) -> None:
        live = self._live
        for run in frame.tokens.runs:  # once per token: no context manager here
            entry = live.get(run.attempt)
            if entry is None:
                self._counts.add("late_messages")
                self._counts.add("late_tokens")
                continue
            try:
                logprobs = [logprobs_from_wire(scores) for scores in run.logprobs] if run.logprobs else ()
                entry[0].on_tokens(worker, run.position, run.ids, logprobs)
            except Exception as error:  # noqa: BLE001 (told to the request)
                self._fault(entry[0], error)

    def _on_handoff_failed(self, worker: Worker, frame: wire.WorkerFrame) -> None:
        message = frame.handoff_failed
        with self._about(message.attempt, "handoff_failed") as request:
            if request is not None:
                retry = message.retry_after_ms / 1e3 if message.HasField("retry_after_ms") else None
                reason = read_refusal(message.reason)
                request.on_handoff_failed(worker, message.handoff, reason, message.message, retry)

    def _on_resident(self, worker: Worker, frame: wire.WorkerFrame) -> None:
        with self._about(frame.resident.attempt, "resident") as request:
            if request is not None:
                request.on_resident(worker, frame.resident.handoff)

    def _on_prefill_report(self, worker: Worker, frame: wire.WorkerFrame) -> None:
        message = frame.prefill_report
        if message.attempt not in self._live:
            return  # after a stop string, a cancel or a slow report: nothing hangs on it any more
        with self._about(message.attempt, "prefill_report") as request:
            if request is not None:
                request.on_prefill_report(worker, read_times(message))

    def _on_ended(self, worker: Worker, frame: wire.WorkerFrame) -> None:
        with self._about(frame.ended.attempt, "ended") as request:
            if request is not None:
                request.on_ended(worker, read_end(frame.ended))

    def _on_freed(self, worker: Worker, frame: wire.WorkerFrame) -> None:
        attempt = frame.freed.attempt
        if not self._acknowledge(attempt, worker):
            self._counts.add("late_messages")
            self._counts.add("late_freed")
        if attempt in self._live:
            with self._about(attempt, "freed") as request:
                if request is not None:
                    request.on_freed(worker)

    def _on_load(self, worker: Worker, frame: wire.WorkerFrame) -> None:
        worker.reported(frame.load)

    # What the requests want.

    def choose_decode(self, request: Request, avoid: str) -> Choice | None:
        """See `Port`."""
        _, model, digests = self._live[request.key]
        cached, order = {}, request.order
        if len(model.usable("decode")) > 1:
            cached = self.prefixes.cached_tokens(model.card, order.spec, digests)
        return self._placer.choose_decode(model, order, cached, request.attempt.handoffs.excluded, avoid)

    def send_prompt(
        self, worker: Worker, spec: SequenceSpec, deadline_s: float, ttft_left_s: float | None, direct: bool
    ) -> None:
        """See `Port`."""
        message = spec_to_wire(spec, deadline_s, ttft_left_s)
        if direct:
            worker.link.send(wire.RouterFrame(direct=wire.DirectCommand(spec=message)))
        else:
            worker.link.send(wire.RouterFrame(prefill=wire.PrefillCommand(spec=message)))

    def send_bind(self, worker: Worker, key: HandoffKey, decode: Worker) -> None:
        """See `Port`."""
        self._placer.settled(key.attempt)
        worker.link.send(
            wire.RouterFrame(
                bind=wire.BindCommand(
                    attempt=key.attempt,
                    handoff=key.handoff,
                    decode_worker=process_to_wire(decode.process),
                )
            )
        )

    def send_cancel(self, workers: Iterable[Worker], attempt: AttemptKey, reason: str) -> None:
        """See `Port`."""
        told = {worker for worker in workers if not worker.lost}
        if not told:
            return
        self._cancelling.setdefault(attempt, set()).update(told)
        for worker in told:
            worker.link.send(wire.RouterFrame(cancel=wire.CancelCommand(attempt=attempt, reason=reason)))
            self._counts.add("cancels")
        while len(self._cancelling) > CANCELLING_LIMIT:
            self._cancelling.popitem(last=False)
            self._counts.add("cancels_unanswered")

    def closed(self, request: Request) -> None:
        """See `Port`."""
        self._live.pop(request.key, None)
        self._placer.settled(request.key)

    def _acknowledge(self, attempt: AttemptKey, worker: Worker) -> bool:
        waiting = self._cancelling.get(attempt)
        if waiting is None or worker not in waiting:
            return False
        waiting.discard(worker)
        if not waiting:
            del self._cancelling[attempt]
            if not self._cancelling:
                self._all_freed.set()
        return True

    @contextlib.contextmanager
    def _about(self, attempt: AttemptKey, kind: str) -> Iterator[Request | None]:
        """The live request that a frame is about, or None, counted."""
        entry = self._live.get(attempt)
        if entry is None:
            self._counts.add("late_messages")
            self._counts.add(f"late_{kind}")
            yield None
            return
        with self._guarded(entry[0]):
            yield entry[0]

    @contextlib.contextmanager
    def _guarded(self, request: Request) -> Iterator[None]:
        """A fault in one request ends that one and no other."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 (told to the request)
            self._fault(request, error)

    def _fault(self, request: Request, error: Exception) -> None:
        if isinstance(error, BatonError):
            request.fail(error)
            return
        log.error("unexpected error in a request", request_id=request.order.spec.request_id, exc_info=error)
        request.fail(Internal("internal error; the router's log has the details"), cut=True)
