"""The decode role: carries out the router's commands, and reports what it holds."""

from __future__ import annotations

from baton.cost import CostModel
from baton.engine.api import Engine
from baton.errors import ResourceExhausted
from baton.messages import CancelCommand, Command, DirectCommand, Ended, Freed, LoadReport, Pulse
from baton.spec import AttemptKey, SequenceSpec
from baton.telemetry import Counts
from baton.worker.admission_queue import AdmissionQueue, WaitingPrompt
from baton.worker.load import LoadReporter
from baton.worker.service import WorkerService
from baton.worker.session import RouterSession
from decode_worker.handoffs import DecodeHandoffs, MakeReceivers
from decode_worker.occupancy import Occupancy
from decode_worker.running import Residents
from decode_worker.scheduler import DecodeScheduler
from decode_worker.writer_streams import WriterStreams
from kvtransfer.blocks.admission import Admission
from kvtransfer.blocks.pool import BlockPool
from kvtransfer.handoffs.grants import GrantLedger
from kvtransfer.handoffs.messages import Aborted
from kvtransfer.handoffs.outcomes import LedgerLimits


class DecodeRole:
    """Composes queue, residents and handoffs; each knows only those before it. A `RoleHandler`."""

    def __init__(
        self,
        *,
        engine: Engine,
        pool: BlockPool,
        fingerprint: str,
        writers: WriterStreams,
        make_receivers: MakeReceivers,
        limits: LedgerLimits,
        max_sequences: int,
        chunk_tokens: int,
        worker: WorkerService,
        counts: Counts,
        model: CostModel,
        tpot_budget_s: float | None = None,
    ) -> None:
        """`make_receivers` makes the transports' receivers, which report to its argument."""
        self.layout, self.fingerprint = engine.layout, fingerprint
        self._counts = counts
        aborted: list[Aborted] = []
        self.ledger = GrantLedger(pool, limits, aborted.append, counts=counts)
        self._load = LoadReporter(worker, pool, model, chunk_tokens, self._report)
        admission = Admission(pool, engine.layout, fingerprint)
        scheduler = DecodeScheduler(
            chunk_tokens, lambda: model.cost, tpot_budget_s, block_tokens=engine.layout.block_tokens
        )
        self._occupancy = Occupancy(self.ledger, engine.layout, max_sequences)
        self._queue = AdmissionQueue[WaitingPrompt](admission, model, chunk_tokens, lambda spec: spec.kv_tokens)
        self._residents = Residents(
            engine=engine,
            scheduler=scheduler,
            model=model,
            queue=self._queue,
            occupancy=self._occupancy,
            admission=admission,
            fingerprint=fingerprint,
            counts=counts,
            load=self._load,
        )
        self.runner, self._line = self._residents.runner, self._residents.line
        self.handoffs = DecodeHandoffs(self._residents, aborted, scheduler, writers, engine.layout, make_receivers)

    @property
    def live(self) -> dict[str, int]:
        """Counts of what this role holds, for `Admin.GetStatus`."""
        statistics = self.ledger.statistics()
        return {
            "residents": len(self._residents),
            "prompts_waiting": len(self._queue),
            "handoffs_waiting": len(self._line),
            "stalled": len(self._residents.growth),
            "grants": statistics.granted + statistics.receiving,
            "aborting": statistics.aborting,
            "decode_tombstones": statistics.tombstones,
        }

    @property
    def pulse(self) -> Pulse | None:
        """None without sequences."""
        return self.runner.pulse if len(self._residents) else None

    def on_command(self, router: RouterSession, command: Command) -> None:
        match command:
            case DirectCommand(spec):
                self._direct(router, spec)
            case CancelCommand(attempt):
                self._cancel(router, attempt)

    def on_router_lost(self, router: RouterSession) -> None:
        running = {resident.key.attempt for resident in self._residents if resident.router is router}
        waiting = {prompt.key for prompt in self._queue if prompt.router is router}
        on_the_way = {key.attempt for key, pending in self._occupancy.pending.items() if pending.router is router}
        parked = {entry.key.attempt for entry in self._line if entry.router is router}
        for attempt in running | waiting | on_the_way | parked:
            self._cancel(router, attempt)

    def expire(self) -> None:
        self.handoffs.expire()
        self._residents.check_backlogs()

    async def stop(self) -> None:
        self._load.close()
        await self.runner.stop()

    def _direct(self, router: RouterSession, spec: SequenceSpec) -> None:
        if spec.attempt in self._queue or spec.attempt in self._residents:
            self._counts.add("duplicate_messages")
            return
        if self.ledger.attempts.is_cancelled(spec.attempt):  # its cancel came first, and was acknowledged
            self._counts.add("late_messages")
            return
        try:
            self._queue.add(WaitingPrompt(spec, router))
        except ResourceExhausted as error:
            router.send(Ended(spec.attempt, error=error))
        self._residents.start_waiting()

    def _cancel(self, router: RouterSession, attempt: AttemptKey) -> None:
        aborted = self.handoffs.cancel(attempt)
        if self._residents.cancel(attempt):
            return
        waited = self._queue.remove(attempt)
        if waited:
            self._residents.start_waiting()  # the next prompt may fit where this one did not
        unproven = self.handoffs.tell_freed(router, attempt)
        if not unproven:
            router.send(Freed(attempt))
        self._counts.add("cancels" if aborted or unproven or waited else "cancels_unknown")

    def _report(self) -> LoadReport:
        grants = [self.ledger.grant(key) for key in self._occupancy.on_the_way()]
        return LoadReport(
            waiting=len(grants) + len(self._queue) + len(self._line),
            running=len(self._residents),
            waiting_tokens=self._queue.tokens + self._residents.uncomputed,
            resident_tokens=sum(len(resident.tokens) for resident in self._residents),
            granted_blocks=sum(len(grant.table) for grant in grants if grant is not None),
            promised_blocks=self._occupancy.promised,
        )
