"""The prefill role: queues prompts, computes them in chunks, streams their first token and hands their KV over.

`prefill_worker.attempt` has the life of an attempt. Everything here runs on the event loop; compute is on the runner's
thread and block writes are on the senders' threads, so blocks are freed (`_release`) only when both have let go.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import structlog

from baton import errors
from baton.cost import CostModel
from baton.engine.api import Engine
from baton.rpc.convert import process_from_wire, run_to_wire, spec_from_wire
from baton.spec import AttemptKey, FinishReason, HandoffKey
from baton.telemetry import Counts
from baton.v1 import transfer_pb2
from baton.v1 import worker_pb2 as wire
from baton.worker.load_report import load_report
from baton.worker.load_reporter import LoadReporter
from baton.worker.prompt_queue import PromptQueue
from baton.worker.results import TokenFrames, for_each
from baton.worker.runner import Runner, StepItem, StepReport
from baton.worker.sending.outbound import Outbound
from baton.worker.sending.senders import Senders
from baton.worker.service import RouterSession, WorkerService
from kvtransfer.blocks.admission import Admission
from kvtransfer.blocks.pool import BlockPool
from kvtransfer.handoffs.messages import RefusalReason
from kvtransfer.transports.base import Writer
from prefill_worker.attempt import Attempt, State, handoff_failed
from prefill_worker.scheduler import PrefillScheduler
from prefill_worker.tombstones import Tombstones

HOLD_S = 120.0
"""How long a computed prompt is held for a decode worker to take it; the router gives up earlier, and says so."""
INTERNAL, EXHAUSTED = 13, 8  # google.rpc.Code
log = structlog.get_logger(__name__)


class PrefillRole:
    """One prefill worker's attempts. Implements `RoleHandler`, `StepEvents` and `OutboundEvents`."""

    def __init__(
        self,
        *,
        engine: Engine,
        pool: BlockPool,
        fingerprint: str,
        transports: dict[str, Writer],
        handshake: Callable[[], transfer_pb2.HandshakeRequest],
        chunk_tokens: int,
        max_ungranted: int,
        handoff_deadline_s: float,
        worker: WorkerService,
        counts: Counts,
        model: CostModel | None = None,
    ) -> None:
        self.layout = engine.layout
        self.pool = pool
        self._admission = Admission(pool, self.layout, fingerprint)
        self._chunk_tokens, self._max_ungranted, self._counts = chunk_tokens, max_ungranted, counts
        self._attempts: dict[AttemptKey, Attempt] = {}
        self._started: dict[AttemptKey, Attempt] = {}
        self._waiting: PromptQueue[Attempt] = PromptQueue()
        self.senders = Senders(handshake, transports, self, handoff_deadline_s, counts)
        self._tombstones = Tombstones()
        model = model or CostModel()
        self.runner = Runner(engine, PrefillScheduler(chunk_tokens, lambda: model.cost), self, model)
        self._load = LoadReporter(worker, self._load_report)

    @property
    def live(self) -> dict[str, int]:
        """Counts of what this role holds, for `Admin.GetStatus`."""
        return {
            "attempts": len(self._attempts),
            "deliveries": self.senders.handoffs,
            "senders": len(self.senders),
            "prefill_tombstones": len(self._tombstones),
        }

    # -- the router's commands -----------------------------------------------------------------------------------

    def on_command(self, router: RouterSession, frame: wire.RouterFrame) -> None:
        """See `RoleHandler`."""
        kind = frame.WhichOneof("body")
        if kind == "prefill":
            self._prefill(router, frame.prefill.spec)
        elif kind == "bind":
            self._bind(router, frame.bind)
        elif kind == "cancel":
            self._cancel(router, frame.cancel.attempt)

    def on_router_lost(self, router: RouterSession) -> None:
        """See `RoleHandler`."""
        for attempt in [attempt for attempt in self._attempts.values() if attempt.router is router]:
            self._end(attempt, acknowledge=True)

    def _prefill(self, router: RouterSession, message: wire.SequenceSpec) -> None:
        try:
            spec = spec_from_wire(message)
        except errors.InvalidArgument as error:
            router.send(ended=wire.Ended(attempt=message.attempt, status=INTERNAL, message=str(error)))
            return
        if spec.attempt in self._attempts or spec.attempt in self._tombstones:
            # A tombstone: it is over, or its cancel came first, and that was acknowledged.
            self._counts.add("duplicate_messages" if spec.attempt in self._attempts else "late_messages")
            return
        if obstacle := self._admission.obstacle(spec.known_tokens):
            router.send(ended=wire.Ended(attempt=spec.attempt, status=EXHAUSTED, message=obstacle))
            return
        attempt = self._attempts[spec.attempt] = Attempt(spec, router, digests=self._admission.digests(spec))
        cached = self._admission.cached(spec, attempt.digests)
        work_s = self.runner.cost.prefill(spec.known_tokens - cached, cached, self._chunk_tokens)
        self._waiting.push(attempt, work_s)
        self._start_waiting()

    def _bind(self, router: RouterSession, message: wire.BindCommand) -> None:
        attempt, key = self._attempts.get(message.attempt), HandoffKey(message.attempt, message.handoff)
        if attempt is None:
            self._counts.add("late_messages")
            gone = "the prompt is not held here any more"
            router.send(handoff_failed=handoff_failed(key, RefusalReason.EXPIRED, gone, None))
            return
        if attempt.over or attempt.state is State.WAITING:
            self._counts.add("late_messages")  # or early: a router binds after `Started` only
            return
        outbound = attempt.outbound
        if outbound is None:
            outbound = attempt.hand_over(key, self.layout.block_tokens)
        elif not self._rebind(attempt, outbound, key):
            return
        attempt.hold_until = None
        attempt.sender = self.senders.to(process_from_wire(message.decode_worker))
        attempt.sender.start(outbound)

    def _rebind(self, attempt: Attempt, outbound: Outbound, key: HandoffKey) -> bool:
        former = attempt.sender
        if key.handoff <= outbound.key.handoff:
            self._counts.add("duplicate_messages")
            return False
        if former is not None:
            former.drop(outbound, "bound anew")
        attempt.granted = False
        return outbound.delivery.rebind(key)

    def _cancel(self, router: RouterSession, key: AttemptKey) -> None:
        self._tombstones.add(key, time.monotonic())
        attempt = self._attempts.get(key)
        if attempt is None:
            self._counts.add("cancels_unknown")
            router.send(freed=wire.Freed(attempt=key))
        else:
            self._counts.add("cancels")
            self._end(attempt, acknowledge=True)

    # -- computing -----------------------------------------------------------------------------------------------

    def _start_waiting(self) -> None:
        """Starts prompts in turn while the engine has less than two chunks ahead of them and decode workers keep up."""
        while (attempt := self._waiting.first(time.monotonic(), self._ahead_s)) is not None:
            ahead = attempt.tokens_ahead(self._started.values())
            ungranted = sum(not other.granted for other in self._started.values())
            if ahead >= 2 * self._chunk_tokens or ungranted >= self._max_ungranted:
                break
            room = self._admission.reserve(attempt.spec, attempt.digests, attempt.spec.known_tokens)
            if room is None:
                break
            self._waiting.remove(attempt)
            attempt.blocks, attempt.cached_tokens = list(room.blocks), room.cached_tokens
            self._start(attempt)
        self._load.changed()

    def _ahead_s(self, attempt: Attempt) -> float:
        ahead = attempt.tokens_ahead(self._started.values())
        return max(0.0, self.runner.cost.prefill(ahead, 0, self._chunk_tokens) - self.runner.under_way_s)

    def _start(self, attempt: Attempt) -> None:
        self._started[attempt.key] = attempt
        attempt.state = State.COMPUTING
        attempt.started_at = time.monotonic()
        attempt.in_engine = True
        attempt.computed = attempt.cached_tokens
        self.runner.add(attempt.sequence())
        attempt.router.send(
            started=wire.Started(attempt=attempt.key, queue_ms=attempt.queue_ms, cached_tokens=attempt.cached_tokens)
        )

    def on_step(self, report: StepReport) -> None:
        """See `StepEvents`. What raises for one sequence ends that one alone."""
        frames = TokenFrames()
        for_each(report.items, lambda item: self._computed(item, report, frames), self._broken)
        frames.send()
        drawn = [item for item in report.items if item.token_ids]
        for_each(drawn, lambda item: self._first_token(item, report.started + report.seconds), self._broken)
        self._start_waiting()

    def _computed(self, item: StepItem, report: StepReport, frames: TokenFrames) -> None:
        attempt = self._attempts.get(item.key)
        if attempt is None:
            self._counts.add("late_steps")
            return
        attempt.in_engine = not (item.token_ids or report.error)
        self._counts.add("prompt_tokens_wasted" if attempt.over else "prompt_tokens", attempt.advance(item.computed))
        if attempt.over:
            return  # `on_removed` follows
        if report.error:
            self._fail(attempt, INTERNAL, f"prefill failed: {report.error}")
            return
        if item.token_ids:
            frames.add(attempt.router, run_to_wire(item.key, item.position, item.token_ids, item.logprobs))
        elif attempt.outbound is not None and attempt.sender is not None:
            attempt.outbound.delivery.computed(attempt.computed)
            attempt.sender.advance(attempt.outbound)

    def _broken(self, item: StepItem, reason: str) -> None:
        self._counts.add("results_failed")
        attempt = self._attempts.get(item.key)
        if attempt is not None and not attempt.over:
            self._fail(attempt, INTERNAL, f"prefill failed: {reason}")

    def on_removed(self, key: AttemptKey) -> None:
        """See `StepEvents`."""
        attempt = self._attempts.get(key)
        if attempt is not None:
            attempt.in_engine = False
            self._release_if_idle(attempt)

    def _first_token(self, item: StepItem, now: float) -> None:
        attempt = self._attempts.get(item.key)
        if attempt is None or attempt.over:
            return
        attempt.first, attempt.first_token_at = item, now
        attempt.state = State.DELIVERING
        self._admission.remember(attempt.blocks, attempt.digests)
        if item.finish is not None:
            self._finish(attempt, item.finish)
            return
        attempt.hold_until = now + HOLD_S
        if attempt.outbound is not None:
            attempt.tell_progress(attempt.outbound)
            if attempt.sender is not None:
                attempt.sender.advance(attempt.outbound)

    def _finish(self, attempt: Attempt, reason: FinishReason) -> None:
        """The first token was the last one: nobody needs the KV."""
        attempt.router.send(prefill_report=attempt.report())
        attempt.router.send(ended=attempt.finished(reason))
        self._end(attempt, acknowledge=False)

    # -- the handoff (`OutboundEvents`) --------------------------------------------------------------------------

    def granted(self, outbound: Outbound) -> None:
        """See `OutboundEvents`."""
        attempt = self._attempts.get(outbound.key.attempt)
        if attempt is not None:
            attempt.granted = True
            self._start_waiting()

    def released(self, outbound: Outbound) -> None:
        """See `OutboundEvents`."""
        attempt = self._attempts.get(outbound.key.attempt)
        if attempt is not None:
            attempt.report_due = True
            self._end(attempt, acknowledge=False)

    def failed(
        self, outbound: Outbound, reason: RefusalReason, message: str, retry_after_s: float | None = None
    ) -> None:
        """See `OutboundEvents`."""
        attempt = self._attempts.get(outbound.key.attempt)
        if attempt is None or attempt.over:
            return
        self._counts.add("handoffs_failed")
        about = {"request": outbound.spec.request_id, "handoff": str(outbound.key)}
        log.info("handoff failed", **about, reason=reason.name, message=message)
        attempt.granted = False
        attempt.hold_until = time.monotonic() + HOLD_S
        attempt.router.send(handoff_failed=handoff_failed(outbound.key, reason, message, retry_after_s))

    def settled(self, outbound: Outbound) -> None:
        """See `OutboundEvents`."""
        attempt = self._attempts.get(outbound.key.attempt)
        if attempt is not None:
            self._release_if_idle(attempt)

    # -- endings -------------------------------------------------------------------------------------------------

    def expire(self) -> None:
        """Gives up prompts that nobody came for, and forgets old cancels."""
        self._tombstones.expire(now := time.monotonic())
        for attempt in list(self._attempts.values()):
            if attempt.hold_until and attempt.hold_until < now and not (attempt.granted or attempt.over):
                self._fail(attempt, EXHAUSTED, f"no decode worker took it within {HOLD_S:g} s")

    async def stop(self) -> None:
        """Ends senders, threads and the engine."""
        self._load.close()
        await self.senders.stop()
        await self.runner.stop()

    def _fail(self, attempt: Attempt, status: int, message: str) -> None:
        attempt.router.send(ended=wire.Ended(attempt=attempt.key, status=status, message=message))
        self._end(attempt, acknowledge=False)

    def _end(self, attempt: Attempt, *, acknowledge: bool) -> None:
        """The attempt is over here; its blocks are freed as soon as neither step nor write touches them."""
        attempt.acknowledge |= acknowledge
        if not attempt.over:
            attempt.over = True
            self._waiting.remove(attempt)
            if attempt.sender is not None and attempt.outbound is not None:
                attempt.sender.drop(attempt.outbound, "the attempt is over")
            if attempt.in_engine:
                self.runner.remove(attempt.key)
        self._release_if_idle(attempt)

    def _release_if_idle(self, attempt: Attempt) -> None:
        if not attempt.over or attempt.busy:
            return
        attempt.state = State.RELEASED
        del self._attempts[attempt.key]
        self._tombstones.add(attempt.key, time.monotonic())
        self._started.pop(attempt.key, None)
        self.pool.release(attempt.blocks)
        if attempt.report_due:  # not earlier: the last write may return after the news that it arrived
            attempt.router.send(prefill_report=attempt.report())
        if attempt.acknowledge:
            attempt.router.send(freed=wire.Freed(attempt=attempt.key))
        self._start_waiting()

    def _load_report(self) -> wire.LoadReport:
        computing = sum(attempt.uncomputed for attempt in self._started.values() if attempt.in_engine)
        return load_report(
            self.pool,
            waiting=len(self._waiting),
            running=len(self._started),
            waiting_tokens=self._waiting.tokens + computing,
            resident_tokens=self.pool.statistics().held * self.layout.block_tokens,
            model=self.runner.model,
            chunk_tokens=self._chunk_tokens,
            pairs=self.senders.by_transport(),
        )
