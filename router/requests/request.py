"""One request, from its admission to its end.

    QUEUED ----Started----> PREFILLING --first token--> HANDING_OFF --Resident--> DECODING
      |                         |                            |                       |
      |                         +--ends on first token--> FINISHED <-----Ended, stop string
      +-------------------------+----------------------------+-----------------------+--> FAILED | CANCELLED

| state       | holds                                             | moved on by                                      |
|-------------|---------------------------------------------------|--------------------------------------------------|
| QUEUED      | a place in the prefill worker's queue             | the prefill worker: Started                      |
| PREFILLING  | blocks there; from Bind on maybe a grant          | its first token                                  |
| HANDING_OFF | blocks on both sides                              | the decode worker: Resident (or its first token) |
| DECODING    | blocks on the decode worker                       | its Ended; a stop string found here              |

The workers own the blocks. The router frees them by telling every worker that may hold something (`Attempt.holding`)
to cancel; each answers Freed. What comes from a worker that the attempt does not name, or of an older handoff, is
dropped and counted. Losing a worker ends the request with UNAVAILABLE, but for a prefill worker once DECODING, and for
a decode worker that is only bound: then another is bound.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import structlog

from baton.errors import BatonError, Cancelled, DeadlineExceeded, Internal, ResourceExhausted, Unavailable
from baton.spec import AttemptKey, TokenLogprobs
from baton.telemetry import Counts
from router.placement.offers import Way
from router.placement.policy import Plan
from router.requests.attempt import Attempt, End
from router.requests.delivery import Delivery
from router.requests.handoff import Refusal
from router.requests.order import OVER, Order, Port, State
from router.requests.streams import ClientStream
from router.requests.timeline import Marks, Outcome, Path, PrefillTimes, Reason
from router.workers.worker import Worker

log = structlog.get_logger(__name__)
REPORT_WAIT_S = 0.25
"""How long the end waits for the prefill worker's report, which completes the timeline."""
MISSING_WAIT_S = 2.0
"""How long the end waits for tokens that were counted but have not come."""


class Request:
    """The state machine. Driven by messages, timers and the client; lives on one event loop; never waits."""

    def __init__(
        self, order: Order, prefill: Worker, stream: ClientStream, port: Port, counts: Counts, plan: Plan
    ) -> None:
        """`prefill` is the worker that `plan` chose; it decodes too where the plan is direct."""
        self.order, self.stream, self.plan = order, stream, plan
        self.state = State.QUEUED
        self.attempt = Attempt(order.spec.attempt, prefill)
        self.marks = Marks(order.arrived)
        self._port, self._counts = port, counts
        self._delivery = Delivery(len(order.spec.prompt), order.spec.max_tokens, order.text, counts)
        self._end: End | None = None
        self._reason: Reason | None = None
        self._loop = asyncio.get_running_loop()
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._log = log.bind(request_id=order.spec.request_id, attempt=order.spec.attempt.hex()[:12])

    @property
    def key(self) -> AttemptKey:
        return self.attempt.key

    # Commands: from the service.

    def start(self) -> None:
        """Sends the prompt on its way."""
        prefill, spec, now = self.attempt.prefill, self.order.spec, self._loop.time()
        left, direct = max(self.order.deadline - now, 0.0), self.plan.way is Way.DIRECT
        self._arm("deadline", left, self._on_deadline)
        prefill.prefill.place(self.key, len(spec.prompt), self.plan.queued)
        if direct:
            self.attempt.stay(self.order.demand, self.order.tpot_s)
        self._counts.add("path_direct" if direct else "path_disaggregated")
        self._port.send_prompt(prefill, spec, left, self.order.ttft_left_s(now), direct)
        self.marks.commanded = now

    def cancel(self, reason: str) -> None:
        """The client wants it no more. Does nothing once the request is over."""
        self._abort(State.CANCELLED, Cancelled(reason))

    def fail(self, error: BatonError, *, cut: bool = False) -> None:
        """Ends with an error, behind the tokens or (`cut`) instead of them. Nothing once the request is over."""
        if self._reason is not None and not cut:
            self._complete()  # all tokens are out: only the timeline would have been fuller
        else:
            self._abort(State.FAILED, error, cut=cut)

    # Messages: from the workers.

    def on_started(self, worker: Worker, queue_ms: float, cached_tokens: int) -> None:
        """The prompt is about to be computed: time to bind a decode worker, unless one token is all."""
        if worker is not self.attempt.prefill or self.state is not State.QUEUED:
            return self._late("started")
        self.marks.queue_ms, self.marks.cached_tokens = queue_ms, cached_tokens
        self.state = State.PREFILLING
        worker.prefill.started(self.key, self._loop.time())
        if self.attempt.direct:
            return self.attempt.resident()  # its blocks are held from now on
        if self.order.spec.max_tokens - len(self.order.spec.output) > 1:
            self._bind("")
        return None

    def on_tokens(self, worker: Worker, position: int, ids: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> None:
        """New tokens, or some that came before."""
        attempt = self.attempt
        if self._reason is not None or (worker is not attempt.prefill and worker is not attempt.decode):
            return self._late("tokens")
        if worker is attempt.decode and not attempt.direct:
            self._decoding()
        piece = self._delivery.accept(position, ids, logprobs)
        if piece is not None:
            self.marks.token(self._loop.time())
            try:
                self.stream.push(piece)
            except ResourceExhausted as error:
                self._counts.add("slow_clients")
                return self.fail(error, cut=True)
            if self.state in (State.QUEUED, State.PREFILLING):
                self._first_token(piece.ids[0])
        if self._delivery.stop is not None:
            self._port.send_cancel(attempt.holding, self.key, "stop string")
            self._finish(Reason.STOP_STRING)
        elif self._end is not None:
            self._check_end(self._end)
        return None

    def on_handoff_failed(
        self, worker: Worker, handoff: int, reason: Refusal, message: str, retry_after_s: float | None
    ) -> None:
        """A handoff came to nothing: the prefill worker still holds the blocks and wants another."""
        attempt, decode = self.attempt, self.attempt.decode
        if worker is not attempt.prefill or handoff != attempt.handoffs.number or self._reason is not None:
            return self._late("handoff_failed")
        if self.state is State.DECODING:  # the sequence did arrive; only the news of it got lost
            self._port.send_cancel([worker], self.key, "the handoff succeeded")
            return None
        if decode is None:
            return self._late("handoff_failed")
        self._counts.add(f"handoffs_failed_{reason.name.lower()}")
        self._log.info("handoff failed", handoff=handoff, worker=decode.name, reason=reason.name, message=message)
        delay = attempt.refused(decode, reason, message, retry_after_s)
        if attempt.times is not None:
            return self.fail(attempt.handoffs.error())  # it has freed the blocks
        choice = self._port.choose_decode(self, decode.name)
        if choice is None:
            return self.fail(attempt.handoffs.error())
        if choice.has_room and choice.worker is not decode:
            return self._bind_to(choice.worker)
        return self._arm("rebind", delay, lambda: self._bind(""))

    def on_resident(self, worker: Worker, handoff: int) -> None:
        """The decode worker owns the sequence now."""
        attempt = self.attempt
        if self._reason is not None or handoff > attempt.handoffs.number:
            return self._late("resident")
        if attempt.decode is None and attempt.readopt(worker, self.order.demand, self.order.tpot_s):
            self._counts.add("handoffs_readopted")  # the news of its failure overtook that of its success
        elif worker is not attempt.decode:
            return self._late("resident")
        return self._decoding()

    def on_prefill_report(self, worker: Worker, times: PrefillTimes) -> None:
        """The prefill worker is done and has freed its blocks."""
        if worker is not self.attempt.prefill or self.attempt.times is not None:
            return self._late("prefill_report")
        self.marks.prefill = self.attempt.times = times
        return None if self.attempt.direct else self._released(worker)

    def on_ended(self, worker: Worker, end: End) -> None:
        """The sequence is over on that worker."""
        attempt, decoding = self.attempt, self.state is State.DECODING
        from_decode = worker is attempt.decode and (decoding or not attempt.direct)
        from_prefill = worker is attempt.prefill and not decoding
        if not (from_decode or from_prefill) or self._end is not None or self._reason is not None:
            return self._late("ended")
        attempt.holding.discard(worker)
        if end.error is not None:
            return self.fail(end.error)
        if from_decode:
            self._decoding()
        self._end = end
        self.marks.first_step_wait_ms, self.marks.decode_ms = end.first_step_wait_ms, end.decode_ms
        return self._check_end(end)

    def on_freed(self, worker: Worker) -> None:
        """A cancelled attempt holds nothing there any more."""
        self._released(worker)

    def on_lost(self, worker: Worker, reason: str) -> None:
        """A worker is gone, and all that it held."""
        attempt = self.attempt
        attempt.holding.discard(worker)
        if self._reason is not None:
            self._released(worker)
        elif worker is attempt.prefill and self.state is not State.DECODING:
            kind = "decode" if attempt.direct else "prefill"
            self.fail(Unavailable(f"{kind} worker {worker} is lost: {reason}", 1.0, f"{kind}_workers"))
        elif worker is attempt.decode and (self.state is State.DECODING or attempt.times is not None):
            self.fail(Unavailable(f"decode worker {worker} is lost: {reason}", 1.0, "decode_workers"))  # the only copy
        elif worker is attempt.decode:
            attempt.unbind()
            self._counts.add("handoffs_failed_lost")
            self._bind("")

    # What follows from them.

    def _bind(self, avoid: str) -> None:
        choice = self._port.choose_decode(self, avoid)
        if choice is None:
            return self.fail(self.attempt.handoffs.error())
        return self._bind_to(choice.worker)

    def _bind_to(self, worker: Worker) -> None:
        self._disarm("rebind")
        key, leave = self.attempt.bind(worker, self.order.demand, self.order.tpot_s)
        if leave is not None:
            self._port.send_cancel([leave], self.key, "bound elsewhere")
        self._counts.add("handoffs")
        self._port.send_bind(self.attempt.prefill, key, worker)

    def _first_token(self, token: int) -> None:
        spec = self.order.spec
        self.attempt.computed(self._loop.time())
        if self.plan.raw_ttft_s is not None:
            accuracy = self.attempt.prefill.accuracy
            now = self._loop.time()
            accuracy.observe(self.plan.raw_ttft_s, self.marks.ttft_ms / 1e3, self.plan.ttft_s, now)
        if self.attempt.direct:
            return self._decoding()
        ends = spec.max_tokens == 1 or token in spec.stop_token_ids or token in spec.eos_token_ids
        if not ends and self.state is State.PREFILLING:
            self.state = State.HANDING_OFF
            self._arm("handoff", self.order.handoff_wait_s, self._on_handoff_deadline)
        return None

    def _decoding(self) -> None:
        if self.state in (State.PREFILLING, State.HANDING_OFF):
            self.state = State.DECODING
            self._disarm("handoff", "rebind")
            now, attempt = self._loop.time(), self.attempt
            attempt.computed(now)  # also where this overtook the first token
            attempt.arrived(self.marks.first_token, now)

    def _check_end(self, end: End) -> None:
        if self._delivery.delivered < end.output_tokens:
            missing = Internal(f"{end.output_tokens - self._delivery.delivered} tokens did not come")
            return self._arm("missing", MISSING_WAIT_S, lambda: self.fail(missing))
        if end.reason is None:
            return self.fail(Internal("the worker ended the sequence without a reason"))
        return self._finish(end.reason)

    def _finish(self, reason: Reason) -> None:
        """All tokens are out; what may be waited for, briefly, is the prefill worker's report."""
        rest = self._delivery.flush()
        self._reason = reason if self._delivery.stop is None else Reason.STOP_STRING
        if rest is not None:
            try:
                self.stream.push(rest)
            except ResourceExhausted as error:
                return self.fail(error, cut=True)
        self._disarm("handoff", "rebind", "missing")
        if self.attempt.times is None and self.attempt.prefill in self.attempt.holding:
            return self._arm("report", REPORT_WAIT_S, self._complete)
        return self._complete()

    def _released(self, worker: Worker) -> None:
        self.attempt.holding.discard(worker)
        if self._reason is not None and worker is self.attempt.prefill:
            self._complete()

    def _complete(self) -> None:
        if self.state in OVER:
            return
        assert self._reason is not None, "only a finished request completes"
        outcome = self._outcome(self._reason)
        self._close(State.FINISHED)
        self.stream.finish(outcome)

    def _abort(self, state: State, error: BatonError, *, cut: bool = False) -> None:
        if self.state in OVER:
            return
        self._log.info("request ended", state=state.value, was=self.state.value, error=str(error))
        self._port.send_cancel(self.attempt.holding, self.key, str(error))
        self._close(state)
        if cut:
            self.stream.cut(error)
        else:
            self.stream.fail(error)

    def _close(self, state: State) -> None:
        self.state = state
        self._disarm(*list(self._timers))
        self.attempt.release(self._loop.time())
        self._counts.add(f"requests_{state.value}")
        self._port.closed(self)

    def _outcome(self, reason: Reason) -> Outcome:
        decoded = self.state is State.DECODING
        decode = self.attempt.decode
        return Outcome(
            reason=reason,
            stop=self._delivery.stop or "",
            prompt_tokens=len(self.order.spec.prompt),
            output_tokens=self._delivery.delivered,
            marks=self.marks,
            total_ms=(self._loop.time() - self.order.arrived) * 1e3,
            attempts=1,
            handoffs=self.attempt.handoffs.number,
            prefill_worker=self.attempt.prefill.name,
            decode_worker=decode.name if decoded and decode is not None else "",
            path=self._path(decoded),
            objectives=self.order.spec.objectives,
            simulated=self.attempt.prefill.card.simulated,
        )

    def _path(self, decoded: bool) -> Path:
        if self.attempt.direct:
            return Path.DIRECT
        return Path.DISAGGREGATED if decoded else Path.PREFILL_ONLY

    def _on_deadline(self) -> None:
        self.fail(DeadlineExceeded("the request's deadline has passed"), cut=True)

    def _on_handoff_deadline(self) -> None:
        self._counts.add("handoffs_given_up")
        self.fail(self.attempt.handoffs.error(self.order.handoff_wait_s))

    def _late(self, kind: str) -> None:
        self._counts.add("late_messages")
        self._counts.add(f"late_{kind}")

    def _arm(self, name: str, delay_s: float, act: Callable[[], None]) -> None:
        self._disarm(name)
        self._timers[name] = self._loop.call_later(delay_s, act)

    def _disarm(self, *names: str) -> None:
        for name in names:
            if (timer := self._timers.pop(name, None)) is not None:
                timer.cancel()
