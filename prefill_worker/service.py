"""The prefill role: carries out the router's commands, and reports what it holds."""

from __future__ import annotations

from baton.cost import CostModel
from baton.engine.api import Engine
from baton.errors import ResourceExhausted
from baton.messages import BindCommand, CancelCommand, Command, Ended, Freed, LoadReport, PrefillCommand, Pulse
from baton.rpc import awake
from baton.spec import AttemptKey, SequenceSpec
from baton.telemetry import Counts
from baton.v1 import transfer_pb2 as wire
from baton.worker.admission_queue import AdmissionQueue
from baton.worker.load import LoadReporter
from baton.worker.service import WorkerService
from baton.worker.session import RouterSession
from kvtransfer.blocks.admission import Admission
from kvtransfer.blocks.pool import BlockPool
from kvtransfer.transports.base import Writer
from prefill_worker.handoffs import PrefillHandoffs
from prefill_worker.prompt import Prompt
from prefill_worker.running import HOLD_S, Prompts
from prefill_worker.scheduler import PrefillScheduler


class PrefillRole:
    """Composes queue, prompts and handoffs; each knows only those before it. A `RoleHandler`."""

    def __init__(
        self,
        *,
        engine: Engine,
        pool: BlockPool,
        fingerprint: str,
        writers: dict[str, Writer],
        handshake: wire.HandshakeRequest,
        chunk_tokens: int,
        max_ungranted: int,
        handoff_deadline_s: float,
        worker: WorkerService,
        counts: Counts,
        model: CostModel,
    ) -> None:
        self._pool, self._block_tokens, self._counts = pool, engine.layout.block_tokens, counts
        self._load = LoadReporter(worker, pool, model, chunk_tokens, self._report)
        admission = Admission(pool, engine.layout, fingerprint)
        scheduler = PrefillScheduler(chunk_tokens, lambda: model.cost)
        self._queue = AdmissionQueue[Prompt](admission, model, chunk_tokens, lambda spec: spec.known_tokens)
        self._prompts = Prompts(
            engine, scheduler, model, self._queue, max_ungranted, pool, admission, counts, self._load
        )
        self._handoffs = PrefillHandoffs(
            self._prompts, handshake, writers, handoff_deadline_s, self._block_tokens, counts
        )
        self.runner, self.senders = self._prompts.runner, self._handoffs.senders

    @property
    def live(self) -> dict[str, int]:
        """Counts of what this role holds, for `Admin.GetStatus`."""
        return {
            "attempts": len(self._prompts),
            "deliveries": self.senders.handoffs,
            "senders": len(self.senders),
            "prefill_tombstones": len(self._prompts.tombstones),
        }

    @property
    def pulse(self) -> Pulse | None:
        """None without prompts that have blocks."""
        return self.runner.pulse if self._prompts.started else None

    def on_command(self, router: RouterSession, command: Command) -> None:
        match command:
            case PrefillCommand(spec):
                self._prefill(router, spec)
            case BindCommand(key, decode):
                self._handoffs.bind(router, key, decode)
            case CancelCommand(attempt):
                self._cancel(router, attempt)

    def on_router_lost(self, router: RouterSession) -> None:
        for prompt in self._prompts:
            if prompt.router is router:
                self._prompts.end(prompt)

    def expire(self) -> None:
        """Gives up computed prompts that no decode worker took in time, and forgets old attempts."""
        now = awake.now()
        self._prompts.tombstones.expire(now)
        for prompt in self._prompts:
            if prompt.hold_until and prompt.hold_until < now and not (prompt.granted or prompt.over):
                self._prompts.fail(prompt, ResourceExhausted(f"no decode worker took it within {HOLD_S:g} s"))

    async def stop(self) -> None:
        self._load.close()
        await self.senders.stop()
        await self.runner.stop()

    def _prefill(self, router: RouterSession, spec: SequenceSpec) -> None:
        live = self._prompts.find(spec.attempt) is not None
        if live or spec.attempt in self._prompts.tombstones:
            # A tombstone: the attempt is over, or its cancel came first and was acknowledged.
            self._counts.add("duplicate_messages" if live else "late_messages")
            return
        try:
            self._prompts.add(Prompt(spec, router))
        except ResourceExhausted as error:
            router.send(Ended(spec.attempt, error=error))

    def _cancel(self, router: RouterSession, key: AttemptKey) -> None:
        self._prompts.bury(key)
        prompt, freed = self._prompts.find(key), Freed(key)
        self._counts.add("cancels" if prompt is not None else "cancels_unknown")
        if prompt is None:
            router.send(freed)
            return
        if freed not in prompt.farewell:
            prompt.farewell.append(freed)
        self._prompts.end(prompt)

    def _report(self) -> LoadReport:
        return LoadReport(
            waiting=len(self._queue),
            running=self._prompts.started,
            waiting_tokens=self._queue.tokens + self._prompts.computing_tokens,
            resident_tokens=self._pool.statistics().held * self._block_tokens,
            pairs=self.senders.by_transport(),
            pair_notes=self.senders.notes(),
        )
