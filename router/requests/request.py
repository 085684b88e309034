"""The client's side of one request: its text, its tokens by position, its deadline and its times.

    OPEN --all tokens are out--> FINISHING --the prefill worker's report, or REPORT_WAIT_S--> OVER
      \\--error, cancel, deadline--------------------------------------------------------------/

The request drives its attempt, which has the workers, handoffs and ledgers: calls go down, and an error that ends the
attempt comes back as an exception. Messages that the attempt does not expect are dropped and counted.
"""

from __future__ import annotations

import asyncio
from enum import Enum, auto

import structlog

from baton import messages
from baton.errors import BatonError, Cancelled, DeadlineExceeded, Internal, ResourceExhausted
from baton.messages import Ended, PrefillReport, TokenRun
from baton.rpc import awake
from baton.spec import FinishReason
from baton.telemetry import Counts
from router.requests.admitted import Admitted
from router.requests.attempt import Attempt, AttemptState
from router.requests.attempts import Attempts
from router.requests.commands import late
from router.requests.failover import Continuation, Failovers
from router.requests.stream import ClientStream, Output, Piece
from router.requests.timeline import Marks, Outcome
from router.requests.timers import Timers
from router.workers.worker import Worker

REPORT_WAIT_S = 0.25
"""How long FINISHING waits for the prefill worker's report, which completes the timeline."""
MISSING_WAIT_S = 2.0
"""How long OPEN waits for the last tokens after Ended."""
LOOK_AGAIN_S = 1.0
"""How often a handoff that waits for room is looked after."""
log = structlog.get_logger(__name__)


class RequestState(Enum):
    OPEN = auto()
    FINISHING = auto()
    OVER = auto()


class Request:
    """Driven by messages, timers and the client. Lives on one event loop; never waits."""

    def __init__(
        self, admitted: Admitted, attempts: Attempts, failovers: Failovers, stream: ClientStream, counts: Counts
    ) -> None:
        self.admitted, self.attempts, self.stream = admitted, attempts, stream
        self.state = RequestState.OPEN
        self.marks = Marks(admitted.arrived)
        self._counts = counts
        self._continuation = Continuation(self, failovers)
        self._output = Output(len(admitted.spec.prompt), admitted.spec.max_tokens, admitted.text, counts)
        self._ended: Ended | None = None
        self._reason: FinishReason | None = None
        self._loop = asyncio.get_running_loop()
        self._timers = Timers()

    @property
    def attempt(self) -> Attempt:
        """The current one."""
        return self.attempts.current

    # From the service.

    def start(self) -> None:
        now = self._loop.time()
        left_s, passed = max(self.admitted.deadline - now, 0.0), "the request's deadline has passed"
        self._timers.arm(
            "deadline", self._loop.call_later(left_s, lambda: self.fail(DeadlineExceeded(passed), cut=True))
        )
        self.attempt.start()
        self.marks.commanded = now

    def cancel(self, reason: str) -> None:
        """No effect once the request is over."""
        self._abort("cancelled", Cancelled(reason))

    def fail(self, error: BatonError, *, cut: bool = False) -> None:
        """Ends with an error, behind the tokens or (`cut`) instead of them. No effect once the request is over."""
        if self.state is RequestState.FINISHING and not cut:
            self._complete()  # all tokens are out; only the timeline lacks a report
        else:
            self._abort("failed", error, cut=cut)

    # From the workers, while the request is not over. A BatonError raised here ends the request.

    def on_started(self, worker: Worker, message: messages.Started) -> None:
        """The prompt is about to be computed: binds a decode worker if one is needed."""
        if self.state is not RequestState.OPEN or self.attempts.between or not self.attempt.started(worker):
            return late(self._counts, "started")
        if self.attempts.number == 1:
            self.marks.queue_ms, self.marks.cached_tokens = message.queue_ms, message.cached_tokens
        if self.attempt.hands_over:
            self.attempt.bind()
        return None

    def on_tokens(self, worker: Worker, run: TokenRun) -> None:
        attempt = self.attempt
        if self.state is not RequestState.OPEN or (worker is not attempt.prefill and worker is not attempt.decode):
            return late(self._counts, "tokens")
        if worker is attempt.decode and not attempt.direct:
            self._decodes()
        piece = self._output.accept(run.position, run.ids, run.logprobs)
        if piece is not None and not self._push(piece):
            return None
        if self._output.stop is not None:
            attempt.cancel("stop string")
            self.finish(FinishReason.STOP_STRING)
        elif self._ended is not None:
            self._check_end(self._ended)
        return None

    def on_handoff_failed(self, worker: Worker, failure: messages.HandoffFailed) -> None:
        """The prefill worker still holds the blocks and wants another handoff."""
        if self.state is not RequestState.OPEN or self.attempts.between:
            return late(self._counts, "handoff_failed")
        pause_s = self.attempt.handoff_failed(worker, failure)
        if pause_s is not None:
            self._timers.later("rebind", pause_s, self.attempt.bind, self.fail)
        return None

    def on_handoff_waiting(self, worker: Worker, message: messages.HandoffWaiting) -> None:
        """There is no room at its decode worker yet; it goes where there is some first."""
        live = self.state is RequestState.OPEN and not self.attempts.between
        if not live or not self.attempt.waits(worker, message.key.handoff):
            return late(self._counts, "handoff_waiting")
        label, decode = self.admitted.spec.request_id, str(self.attempt.decode)
        log.info("waits for room", request_id=label, worker=decode, ahead=message.ahead, ms=round(message.expected_ms))
        return self._look_elsewhere()

    def on_handed_over(self, worker: Worker, message: messages.HandoffDone) -> None:
        number, first_token = message.key.handoff, self.marks.first_token
        if self.state is not RequestState.OPEN or self.attempts.between:
            return late(self._counts, "resident")
        if not self.attempt.handed_over(worker, number, first_token):
            return late(self._counts, "resident")
        return self._timers.disarm("rebind")

    def on_prefill_report(self, worker: Worker, report: PrefillReport) -> None:
        if worker is not self.attempt.prefill or self.attempt.report is not None:
            return late(self._counts, "prefill_report")
        self.attempt.report = report
        return None if self.attempt.direct else self.on_freed(worker)

    def on_ended(self, worker: Worker, ended: Ended) -> None:
        if self.state is not RequestState.OPEN or self.attempts.between or self._ended is not None:
            return late(self._counts, "ended")
        if not self.attempt.ended(worker):
            return late(self._counts, "ended")
        if ended.error is not None:
            return self.fail(ended.error)
        if worker is self.attempt.decode and not self.attempt.direct:
            self._decodes()
        self._ended = ended
        return self._check_end(ended)

    def on_freed(self, worker: Worker) -> None:
        """The attempt holds no blocks there any more."""
        self.attempt.holding.discard(worker)
        if self.state is RequestState.FINISHING and worker is self.attempt.prefill:
            self._complete()

    def on_lost(self, worker: Worker, reason: str) -> None:
        """Where its only copy is lost, another attempt goes on, in its turn."""
        if self.state is RequestState.FINISHING:
            return self.on_freed(worker)
        return self._continuation.lost(worker, reason)

    def on_preempted(self, worker: Worker, message: messages.Preempted) -> None:
        """Its room on the worker was needed; another attempt goes on, in its turn."""
        if self.state is not RequestState.OPEN or not self._continuation.preempted(worker, message.cached_tokens):
            late(self._counts, "preempted")

    def leave(self, worker: Worker, why: str) -> None:
        """Another attempt goes on elsewhere, if the worker still does not move and another one can take it."""
        if self.state is RequestState.OPEN and not self.attempts.between:
            self._continuation.leave(worker, why)

    # From `Continuation`.

    @property
    def open(self) -> bool:
        return self.state is RequestState.OPEN

    @property
    def ids(self) -> tuple[int, ...]:
        """The output so far."""
        return self._output.ids

    def halted(self) -> None:
        """The current attempt is over, and the next one has not begun."""
        self._timers.disarm("rebind", "missing")

    def continued(self) -> None:
        """Another attempt has begun."""
        self.halted()
        self._output.forget_beyond()
        self._ended = None

    def finish(self, reason: FinishReason) -> None:
        """All tokens are out; may wait briefly for the prefill worker's report."""
        rest = self._output.flush()
        self._reason = reason if self._output.stop is None else FinishReason.STOP_STRING
        self.state = RequestState.FINISHING
        if rest is not None:
            try:
                self.stream.push(rest)
            except ResourceExhausted as error:
                return self.fail(error, cut=True)
        self._timers.disarm("rebind", "missing")
        if self.attempt.report is None and self.attempt.prefill in self.attempt.holding:
            return self._timers.arm("report", self._loop.call_later(REPORT_WAIT_S, self._complete))
        return self._complete()

    # Inside.

    def _push(self, piece: Piece) -> bool:
        """False where the client is too far behind to take the tokens; the request is over then."""
        self.marks.token(self._loop.time())
        try:
            self.stream.push(piece)
        except ResourceExhausted as error:
            self._counts.add("slow_clients")
            self.fail(error, cut=True)
            return False
        if self.attempt.state in (AttemptState.QUEUED, AttemptState.PREFILLING):
            self._first_token(piece.ids[0])
        return True

    def _first_token(self, token: int) -> None:
        spec, plan = self.admitted.spec, self.attempt.plan
        full = self._output.delivered == spec.max_tokens
        ends = full or token in spec.stop_token_ids or token in spec.eos_token_ids
        if plan.raw_ttft_s is not None and self.attempt.undisturbed and self.attempts.number == 1:
            accuracy = self.attempt.prefill.accuracy
            accuracy.observe(plan.raw_ttft_s, self.marks.ttft_ms / 1e3, plan.ttft_s, self._loop.time())
        self.attempt.computed(last=ends)

    def _decodes(self) -> None:
        self.attempt.decodes(self.marks.first_token)
        self._timers.disarm("rebind")

    def _look_elsewhere(self) -> None:
        """Now and then, while the handoff waits for room."""
        self.attempt.look_elsewhere()
        self._timers.later("rebind", LOOK_AGAIN_S, self._look_elsewhere, self.fail)

    def _check_end(self, ended: Ended) -> None:
        if self._output.delivered < ended.output_tokens:
            missing = Internal(f"{ended.output_tokens - self._output.delivered} tokens did not come")
            return self._timers.arm("missing", awake.Timer(MISSING_WAIT_S, lambda: self.fail(missing)))
        if ended.reason is None:
            return self.fail(Internal("the worker ended the sequence without a reason"))
        return self.finish(ended.reason)

    def _complete(self) -> None:
        assert self._reason is not None, "only a finished request completes"
        spec = self.admitted.spec
        outcome = Outcome(
            reason=self._reason,
            stop=self._output.stop or "",
            prompt_tokens=len(spec.prompt),
            output_tokens=self._output.delivered,
            marks=self.marks,
            ended=self._ended,
            total_ms=(self._loop.time() - self.admitted.arrived) * 1e3,
            objectives=spec.objectives,
            **self.attempts.facts,
        )
        self._close("finished")
        self.stream.finish(outcome)

    def _abort(self, how: str, error: BatonError, *, cut: bool = False) -> None:
        if self.state is RequestState.OVER:
            return
        attempt, label = self.attempt, self.admitted.spec.request_id
        told = {"attempt": attempt.key.hex()[:12], "state": how, "was": attempt.state.name.lower(), "error": str(error)}
        log.info("request ended", request_id=label, **told)
        attempt.cancel(str(error))
        self._close(how)
        if cut:
            self.stream.cut(error)
        else:
            self.stream.fail(error)

    def _close(self, how: str) -> None:
        self.state = RequestState.OVER
        if tokens := self._output.delivered:
            complete = how == "finished" and self._reason is not FinishReason.LENGTH
            self.admitted.model.lengths.observe(tokens, complete=complete)
        self._timers.clear()
        self.attempt.close()
        self._counts.add(f"requests_{how}")
