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

from baton.errors import BatonError, Internal, InvalidArgument, ResourceExhausted, Unavailable
from baton.rpc.convert import logprobs_from_wire, process_to_wire, spec_to_wire
from baton.spec import AttemptKey, HandoffKey, SequenceSpec
from baton.telemetry import Counts
from baton.v1 import worker_pb2 as wire
from router.frames import read_end, read_refusal, read_times
from router.order import Choice, Order
from router.placement import pick_decode, pick_prefill
from router.prefixes import Prefixes
from router.registry import NOBODY_RETRY_S, ServedModel
from router.request import Request
from router.streams import ClientStream
from router.worker import Worker

CANCELLING_LIMIT = 16_384
FULL_RETRY_S = 1.0
log = structlog.get_logger(__name__)


class Requests:
    """The table of live requests. Implements their `Port`."""

    def __init__(self, max_requests: int, counts: Counts, prefix_blocks: int) -> None:
        self._max, self._counts = max_requests, counts
        self.prefixes = Prefixes(prefix_blocks, counts)
        self._labels: set[tuple[str, str]] = set()
        self._live: dict[AttemptKey, tuple[Request, ServedModel]] = {}
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
        """Places the prompt and sends it. Raises Unavailable without workers of both roles, at once."""
        if self._refusing is not None:
            raise self._refusing
        prefill = model.usable("prefill")
        for role, workers in (("prefill", prefill), ("decode", model.usable("decode"))):
            if not workers:
                self._counts.add("requests_refused")
                raise Unavailable(f"no {role} worker of {model.card.name} is there", NOBODY_RETRY_S, f"{role}_workers")
        blocks = model.card.kv_layout.blocks_for(len(order.spec.prompt))
        decision = pick_prefill([worker.prefill_load() for worker in prefill], blocks)
        if decision is None:
            raise ResourceExhausted(f"no prefill worker's pool has {blocks} blocks", constraint="prefill_blocks")
        chosen = next(worker for worker in prefill if worker.name == decision.chosen)
        request = Request(order, chosen, stream, self, self._counts)
        self._live[request.key] = (request, model)
        self._counts.add("requests")
        request.start()
        return request

    def refuse_all(self, error: BatonError) -> None:
        """Ends what runs, and refuses what comes, with this error."""
        self._refusing = error
        for request, _ in list(self._live.values()):
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
        for request, _ in list(self._live.values()):
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
        for run in frame.tokens.runs:
            with self._about(run.attempt, "tokens") as request:
                if request is not None:
                    request.on_tokens(
                        worker, run.position, run.ids, [logprobs_from_wire(entry) for entry in run.logprobs]
                    )

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
        _, model = self._live[request.key]
        workers = model.reachable("decode")
        refusers = request.attempt.handoffs.excluded
        excluded = {worker.name for worker in workers if worker.process.incarnation in refusers}
        decision = pick_decode([worker.decode_load() for worker in workers], request.order.demand, excluded, avoid)
        if decision is None:
            return None
        room = any(candidate.name == decision.chosen and candidate.feasible for candidate in decision.candidates)
        return Choice(next(worker for worker in workers if worker.name == decision.chosen), room)

    def send_prefill(self, worker: Worker, spec: SequenceSpec, deadline_s: float) -> None:
        """See `Port`."""
        worker.link.send(wire.RouterFrame(prefill=wire.PrefillCommand(spec=spec_to_wire(spec, deadline_s))))

    def send_bind(self, worker: Worker, key: HandoffKey, decode: Worker) -> None:
        """See `Port`."""
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
        except BatonError as error:
            request.fail(error)
        except Exception as error:
            log.error("unexpected error in a request", request_id=request.order.spec.request_id, exc_info=error)
            request.fail(Internal("internal error; the router's log has the details"), cut=True)
