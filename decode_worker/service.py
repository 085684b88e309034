"""The decode role: grants room, takes sequences over when their KV has landed, and streams their tokens.

    GRANTED -> RECEIVING -> RESIDENT -> RELEASED       (`kvtransfer.handoffs.grants` owns the states up to RESIDENT)

A sequence's blocks are the ledger's. Until it is resident, whoever aborts it frees them through the ledger (perhaps
after a quarantine). From then on `decode_worker.residents` has it; and a prompt that is computed here, from its start.
"""

from __future__ import annotations

import math
import time

import structlog

from baton.cost import HANDOFF_S, CostModel
from baton.engine.api import Engine, Sequence
from baton.handoff_times import HandoffTimes
from baton.rpc.convert import run_to_wire, spec_from_wire
from baton.spec import AttemptKey, HandoffKey, SequenceSpec
from baton.telemetry import Counts
from baton.v1 import worker_pb2 as wire
from baton.worker.load_report import load_report
from baton.worker.load_reporter import LoadReporter
from baton.worker.service import RouterSession, WorkerService
from decode_worker.direct import DirectPrompts
from decode_worker.records import FirstToken, Pending, Resident, Writers
from decode_worker.residents import Residents
from decode_worker.scheduler import DecodeScheduler
from kvtransfer.blocks.admission import Admission
from kvtransfer.blocks.pool import BlockPool
from kvtransfer.handoffs.grants import GrantLedger
from kvtransfer.handoffs.messages import Aborted, Grant, Refusal, RefusalReason
from kvtransfer.handoffs.outcomes import GrantState, LedgerLimits, Outcome
from kvtransfer.transports.base import Receiver

SLOT_RETRY_S = 0.25
WAKE_EVERY_S = 0.05
"""What comes in for a handoff wakes a resting engine no more often: less than the last chunk of a prompt takes, so that
it is awake when that arrives."""
log = structlog.get_logger(__name__)


class DecodeRole:
    """One decode worker's sequences. Everything runs on the event loop; compute is on the runner's thread."""

    def __init__(
        self,
        *,
        engine: Engine,
        pool: BlockPool,
        fingerprint: str,
        transports: dict[str, Receiver],
        limits: LedgerLimits,
        max_sequences: int,
        chunk_tokens: int,
        worker: WorkerService,
        counts: Counts,
        model: CostModel | None = None,
        tpot_budget_s: float | None = None,
    ) -> None:
        self.layout = engine.layout
        self.pool = pool
        self.fingerprint = fingerprint
        self.transports = transports
        self.ledger = GrantLedger(pool, limits, self._on_abort, counts=counts)
        self.writers: Writers | None = None
        self._max_sequences = max_sequences
        self._chunk_tokens = chunk_tokens
        self._worker = worker
        self._counts = counts
        self._pending: dict[HandoffKey, Pending] = {}
        self._awaiting_proof: dict[HandoffKey, RouterSession] = {}
        self._model = model or CostModel()
        self._admission = Admission(pool, self.layout, fingerprint)
        self._scheduler = scheduler = DecodeScheduler(chunk_tokens, lambda: self._model.cost, tpot_budget_s)
        self.residents = Residents(
            engine, scheduler, self._model, self.ledger, pool, self._admission, fingerprint, counts, self._changed
        )
        self.runner = self.residents.runner
        self._direct = DirectPrompts(
            self.residents,
            self._admission,
            lambda: self._model.cost,
            chunk_tokens,
            self._has_slot,
            self.ledger.is_cancelled,
            counts,
        )
        self._load = LoadReporter(worker, self._load_report)
        self._woken_at = -math.inf
        self._handoffs = HandoffTimes()

    @property
    def live(self) -> dict[str, int]:
        """Counts of what this role holds, for `Admin.GetStatus`."""
        statistics = self.ledger.statistics()
        return {
            "residents": len(self.residents),
            "prompts_waiting": len(self._direct),
            "grants": statistics.granted + statistics.receiving,
            "aborting": statistics.aborting,
            "decode_tombstones": statistics.tombstones,
        }

    # -- the handoff, from the Transfer service ------------------------------------------------------------------

    def open(self, key: HandoffKey, writer: str, message: wire.SequenceSpec, transport: str) -> Grant | Refusal:
        """Reserves room for the whole sequence, or says why not. A duplicate gets the same answer."""
        spec = spec_from_wire(message)
        router = self._worker.session(spec.router)
        refusal = self._refusal(key, spec, router, transport)
        if refusal is not None or router is None:
            self._counts.add("handoffs_refused")
            return refusal or Refusal(key, RefusalReason.UNKNOWN_ROUTER, "no stream to this router")
        now = time.monotonic()
        answer = self.ledger.open(
            key,
            writer,
            self._admission.digests(spec),
            self.layout.blocks_for(spec.known_tokens),
            self.layout.blocks_for(spec.kv_tokens),
            now,
            None if spec.deadline_s is None else now + spec.deadline_s,
        )
        if isinstance(answer, Refusal):
            self._counts.add("handoffs_refused")
        elif self.ledger.state(key) is not GrantState.RESIDENT:
            self._pending[key] = Pending(spec, router, transport, writer)
            self._expect()
            self.transports[transport].admit(answer.ticket)
            self._wake(answer)
        self._load.changed()
        return answer

    def commit(self, key: HandoffKey, generation: int, blocks: int, first: FirstToken) -> Outcome:
        """The writer is done; see `GrantLedger.commit`. Becoming resident answers the writer by itself."""
        outcome = self.ledger.commit(key, generation, blocks, first, time.monotonic())
        return self._settled(key, outcome)

    def closed(self, key: HandoffKey) -> None:
        """The writer writes nothing more under this handoff."""
        pending = self._pending.get(key)
        proof = pending is not None and not self.transports[pending.transport].revoke_proves
        self.ledger.closed(key, time.monotonic(), proof)
        self._check_freed(key)

    def renew(self, writer: str) -> None:
        """Extends the leases of all that this writer was granted."""
        self.ledger.renew(writer, time.monotonic())

    def writer_back(self, writer: str) -> None:
        """The writer has a new control stream: it has failed all that was under way on the old one, and the closes
        that it sent there may be lost. So what it still has here is given up, and its closes are asked for again."""
        now, message = time.monotonic(), "the control stream broke"
        for key in [key for key, pending in self._pending.items() if pending.writer == writer]:
            grant = self.ledger.grant(key)
            if self.ledger.abort(key, RefusalReason.UNREACHABLE, now, message) or grant is None:
                continue
            if self.writers is not None:
                self.writers.aborted(writer, Aborted(grant, RefusalReason.UNREACHABLE, message, proven=False))

    def expire(self) -> None:
        """Gives up what has run out."""
        self.ledger.expire(time.monotonic())

    # -- what the transports report (already on the loop) --------------------------------------------------------

    def landed(self, key: HandoffKey, generation: int, indices: tuple[int, ...]) -> None:
        """See `ReceiverEvents`."""
        outcome = self._settled(key, self.ledger.landed(key, generation, indices, time.monotonic()))
        if outcome is Outcome.PENDING and (grant := self.ledger.grant(key)) is not None:
            self._wake(grant)

    def revoked(self, key: HandoffKey) -> None:
        """See `ReceiverEvents`."""
        if self.ledger.state(key) is GrantState.ABORTING:
            self.ledger.proved(key)
            self._check_freed(key)

    def writer_gone(self, incarnation: str) -> None:
        """See `ReceiverEvents`."""
        self.ledger.writer_gone(incarnation, time.monotonic())
        for key in [key for key, pending in self._pending.items() if pending.writer == incarnation]:
            self._check_freed(key)

    def refused_write(self, key: HandoffKey, why: str) -> None:
        """See `ReceiverEvents`."""
        self._counts.add("writes_refused")
        log.warning("write refused", handoff=str(key), why=why)

    # -- the router's commands -----------------------------------------------------------------------------------

    def on_command(self, router: RouterSession, frame: wire.RouterFrame) -> None:
        """See `RoleHandler`."""
        kind = frame.WhichOneof("body")
        if kind == "direct":
            self._direct.command(router, frame.direct.spec)
            self._load.changed()
        elif kind == "cancel":
            self._cancel(router, frame.cancel.attempt)

    def on_router_lost(self, router: RouterSession) -> None:
        """See `RoleHandler`."""
        lost = {resident.key.attempt for resident in self.residents if resident.router is router}
        lost |= set(self._direct.of_router(router))
        lost |= {key.attempt for key, pending in self._pending.items() if pending.router is router}
        for attempt in lost:
            self._cancel(router, attempt)

    def _cancel(self, router: RouterSession, attempt: AttemptKey) -> None:
        cancelled = self.ledger.cancel(attempt, time.monotonic())
        if self.residents.cancel(attempt):
            return
        waited = self._direct.cancel(attempt)
        if waited:
            self._changed()  # the next one may fit where this one did not
        waiting = [key for key in self._pending if key.attempt == attempt]
        for key in waiting:
            self._awaiting_proof[key] = router
            self._check_freed(key)
        if not waiting:
            router.send(freed=wire.Freed(attempt=attempt))
        self._counts.add("cancels" if cancelled.aborted or waiting or waited else "cancels_unknown")

    async def stop(self) -> None:
        """Ends the engine's thread; whatever is resident is lost with it."""
        self._load.close()
        await self.runner.stop()

    # -- inside --------------------------------------------------------------------------------------------------

    def _refusal(
        self, key: HandoffKey, spec: SequenceSpec, router: RouterSession | None, transport: str
    ) -> Refusal | None:
        if self.ledger.grant(key) is not None:
            return None  # a duplicate: the ledger knows the answer
        if router is None:
            return Refusal(key, RefusalReason.UNKNOWN_ROUTER, f"no stream to router {spec.router.name}")
        if transport not in self.transports:
            offered = ", ".join(self.transports)
            return Refusal(key, RefusalReason.MISMATCH, f"transport differs: sender {transport}, receiver {offered}")
        if not self._has_slot(key.attempt):
            message = f"all {self._max_sequences} sequence slots are taken"
            return Refusal(key, RefusalReason.NO_CAPACITY, message, SLOT_RETRY_S)
        return None

    def _has_slot(self, attempt: AttemptKey = b"") -> bool:
        """Whether one more sequence may run here, beside all others but this attempt."""
        others = sum(other.attempt != attempt for other in self._pending)
        return len(self.residents) + others < self._max_sequences

    def _changed(self) -> None:
        """Room may have come free."""
        self._direct.start_waiting()
        self._load.changed()

    def _settled(self, key: HandoffKey, outcome: Outcome) -> Outcome:
        if outcome is Outcome.RESIDENT:
            self._start(key)
        elif outcome is Outcome.CONFLICT:
            self.ledger.abort(key, RefusalReason.MISMATCH, time.monotonic(), "a message contradicts the grant")
        return outcome

    def _expect(self) -> None:
        """Those on their way, as the scheduler may know them. O(their number), which slots bound."""
        self._scheduler.expected = tuple(
            pending.expected
            for key, pending in self._pending.items()
            if pending.expected is not None and self.ledger.state(key) is not GrantState.ABORTING
        )

    def _wake(self, grant: Grant) -> None:
        """A sequence is on its way to an engine that may have rested for long."""
        now = time.monotonic()
        if not self.residents and now - self._woken_at >= WAKE_EVERY_S:
            self._woken_at = now
            self.runner.wake(grant.table)

    def _start(self, key: HandoffKey) -> None:
        grant, first, pending = self.ledger.grant(key), self.ledger.payload(key), self._pending.pop(key)
        self._expect()
        assert grant is not None, "a resident has a grant"
        assert isinstance(first, FirstToken), "a commit carries the first token"
        self.transports[pending.transport].revoke(key)
        spec = pending.spec
        known = spec.known_tokens
        sequence = Sequence.from_spec(spec, list(grant.table), computed=known)
        sequence.tokens.append(first.token)
        tokens, now = list(sequence.tokens), time.monotonic()
        took_s = now - first.drawn_at
        if key.handoff == 1:  # a later one waited for room, too
            self._handoffs.observe(took_s)
            self._scheduler.handoff_s = max(self._handoffs.expected_s, HANDOFF_S)  # trips are not in what is observed
        sequence.first_token_at = now - max(took_s, HANDOFF_S)
        self.residents.add(Resident(key, spec, pending.router, tokens, resident_at=now, computed=known), sequence)
        if self.writers is not None:
            self.writers.committed(pending.writer, key)
        pending.router.send(resident=wire.Resident(attempt=key.attempt, handoff=key.handoff))
        # The first token once more: should the prefill worker's own message be lost, this one can't be.
        logprobs = (first.logprobs,) if first.logprobs else ()
        run = run_to_wire(key.attempt, known, (first.token,), logprobs)
        pending.router.send(tokens=wire.TokenFrame(runs=[run]))
        self._load.changed()

    def _on_abort(self, aborted: Aborted) -> None:
        """The ledger gave a grant up: stop the writer, and wait for proof where there is none yet."""
        key = aborted.grant.key
        pending = self._pending.get(key)
        request = pending.spec.request_id if pending else ""
        reason = aborted.reason.name
        log.info("handoff given up", request=request, handoff=str(key), reason=reason, message=aborted.message)
        self._counts.add("handoffs_aborted")
        self._expect()
        if pending is None:
            return
        self.transports[pending.transport].revoke(key)
        if self.writers is not None:
            self.writers.aborted(pending.writer, aborted)
        if aborted.proven:
            self._check_freed(key)

    def _check_freed(self, key: HandoffKey) -> None:
        """Drops what is left of an aborted grant once the ledger holds none of its blocks."""
        if self.ledger.state(key) is not None:
            return
        self._pending.pop(key, None)
        self._expect()
        router = self._awaiting_proof.pop(key, None)
        if router is not None and not any(other.attempt == key.attempt for other in self._awaiting_proof):
            router.send(freed=wire.Freed(attempt=key.attempt))
        self._changed()

    def _load_report(self) -> wire.LoadReport:
        on_the_way = (GrantState.GRANTED, GrantState.RECEIVING)
        grants = [self.ledger.grant(key) for key in self._pending if self.ledger.state(key) in on_the_way]
        return load_report(
            self.pool,
            waiting=len(self._pending) + len(self._direct),
            running=len(self.residents),
            waiting_tokens=self._direct.tokens,
            resident_tokens=sum(len(resident.tokens) for resident in self.residents),
            model=self._model,
            chunk_tokens=self._chunk_tokens,
            granted_blocks=sum(len(grant.table) for grant in grants if grant is not None),
        )
