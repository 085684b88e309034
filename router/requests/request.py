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

from baton.errors import BatonError, Cancelled, DeadlineExceeded, Internal, ResourceExhausted
from baton.messages import Ended, HandoffDone, HandoffFailed, PrefillReport, Started, TokenRun
from baton.rpc import awake
from baton.spec import FinishReason, StopRule
from baton.telemetry import Counts
from router.requests.attempt import Attempt, AttemptState, CopyLost
from router.requests.attempts import ATTEMPTS, Attempts
from router.requests.commands import late
from router.requests.failover import Failovers
from router.requests.placer import Admitted
from router.requests.stream import ClientStream, Output, Piece
from router.requests.timeline import Marks, Outcome
from router.requests.timers import Timers
from router.workers.worker import Worker

REPORT_WAIT_S = 0.25
"""How long FINISHING waits for the prefill worker's report, which completes the timeline."""
MISSING_WAIT_S = 2.0
"""How long OPEN waits for the last tokens after Ended."""
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
        self._failovers, self._counts = failovers, counts
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

    def on_started(self, worker: Worker, message: Started) -> None:
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
            self._finish(FinishReason.STOP_STRING)
        elif self._ended is not None:
            self._check_end(self._ended)
        return None

    def on_handoff_failed(self, worker: Worker, failure: HandoffFailed) -> None:
        """The prefill worker still holds the blocks and wants another handoff."""
        if self.state is not RequestState.OPEN or self.attempts.between:
            return late(self._counts, "handoff_failed")
        pause_s = self.attempt.handoff_failed(worker, failure)
        if pause_s is not None:
            self._timers.arm("rebind", self._loop.call_later(pause_s, self._rebind))
        return None

    def on_handed_over(self, worker: Worker, message: HandoffDone) -> None:
        number, first_token = message.key.handoff, self.marks.first_token
        if self.state is not RequestState.OPEN or self.attempts.between:
            return late(self._counts, "resident")
        if not self.attempt.handed_over(worker, number, first_token):
            return late(self._counts, "resident")
        return self._timers.disarm("handoff", "rebind")

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
        try:
            return self.attempts.lost(worker, reason)
        except CopyLost as error:
            self.attempts.retire(error)
            self._timers.disarm("handoff", "rebind", "missing")
            spec, found = self.admitted.spec, error
            return self._failovers.add(spec.priority, self.admitted.arrived, lambda: self._try_again(found))

    def leave(self, worker: Worker, why: str) -> None:
        """Another attempt goes on elsewhere, if the worker still does not move and another one can take it."""
        attempts = self.attempts
        if self.state is not RequestState.OPEN or attempts.between or attempts.number == ATTEMPTS:
            return
        others = all(self.admitted.model.usable(role) for role in worker.registration.roles)
        leaves = others and worker.link.watch.stalled and self.attempt.needs(worker)
        try:
            if leaves and not self.attempt.rebound(worker):
                self._start_next(f"{worker} stalled: {why}")
        except BatonError as error:
            log.info("not bound elsewhere", request_id=self.admitted.spec.request_id, why=str(error))

    def _try_again(self, lost: CopyLost) -> None:
        if self.state is RequestState.OPEN:
            self._start_next(str(lost), lost)

    def _start_next(self, why: str, lost: CopyLost | None = None) -> None:
        """Where no other attempt can be made, the request ends with `lost`; without that the current one stays."""
        label, ids = self.admitted.spec.request_id, self._output.ids
        if ids and (reason := StopRule.of(self.admitted.spec).reason(ids[-1], len(ids))) is not None:
            return self._finish(reason)  # only the news of its end was lost
        try:
            self.attempts.start_next(ids, why)
        except BatonError as error:
            log.info("not failed over", request_id=label, why=str(error))
            return None if lost is None else self.fail(lost)
        except Exception as error:
            log.error("unexpected error in a failover", request_id=label, exc_info=error)
            return self.fail(Internal("internal error; the router's log has the details"), cut=True)
        self._output.forget_beyond()
        self._timers.disarm("handoff", "rebind", "missing")
        self._ended = None
        return None

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
        if self.attempt.state is AttemptState.HANDING_OFF:
            self._timers.arm("handoff", awake.Timer(self.admitted.handoff_wait_s, self._on_handoff_deadline))

    def _decodes(self) -> None:
        self.attempt.decodes(self.marks.first_token)
        self._timers.disarm("handoff", "rebind")

    def _rebind(self) -> None:
        try:
            self.attempt.bind()
        except BatonError as error:
            self.fail(error)

    def _check_end(self, ended: Ended) -> None:
        if self._output.delivered < ended.output_tokens:
            missing = Internal(f"{ended.output_tokens - self._output.delivered} tokens did not come")
            return self._timers.arm("missing", awake.Timer(MISSING_WAIT_S, lambda: self.fail(missing)))
        if ended.reason is None:
            return self.fail(Internal("the worker ended the sequence without a reason"))
        return self._finish(ended.reason)

    def _finish(self, reason: FinishReason) -> None:
        """All tokens are out; may wait briefly for the prefill worker's report."""
        rest = self._output.flush()
        self._reason = reason if self._output.stop is None else FinishReason.STOP_STRING
        self.state = RequestState.FINISHING
        if rest is not None:
            try:
                self.stream.push(rest)
            except ResourceExhausted as error:
                return self.fail(error, cut=True)
        self._timers.disarm("handoff", "rebind", "missing")
        if self.attempt.report is None and self.attempt.prefill in self.attempt.holding:
            return self._timers.arm("report", self._loop.call_later(REPORT_WAIT_S, self._complete))
        return self._complete()

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
        self._timers.clear()
        self.attempt.close()
        self._counts.add(f"requests_{how}")

    def _on_handoff_deadline(self) -> None:
        self._counts.add("handoffs_given_up")
        self.fail(self.attempt.refusal(self.admitted.handoff_wait_s))
