"""The sequences in the engine: turns their steps into tokens, and frees their blocks at the end.

    handed over ----------------------------+
                                            v
    waiting in the queue --room and slot--> RUNNING --its last token, or its step failed--> RELEASED
                                               |                                              ^
                                               +--cancelled, preempted, broken--> STOPPING ---+

The ledger owns a resident's blocks, wherever its prompt was computed. They are freed at RELEASED and nowhere else: once
the engine has confirmed, by the step that finished the sequence or by `on_removed`, that no step touches them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

import structlog

from baton.cost import CostModel
from baton.engine.api import Engine, Sequence
from baton.errors import Internal
from baton.messages import Ended, Freed, Preempted, Started, TokenRun
from baton.rpc import awake
from baton.spec import AttemptKey, HandoffKey
from baton.telemetry import Counts
from baton.worker.admission_queue import AdmissionQueue, WaitingPrompt
from baton.worker.load import LoadReporter
from baton.worker.runner import Runner, StepItem, StepReport, for_each
from baton.worker.session import StepTokens
from decode_worker.growth import Growth
from decode_worker.line import RoomLine, order_of
from decode_worker.occupancy import Occupancy
from decode_worker.records import PromptHere, Resident, ResidentState
from decode_worker.scheduler import DecodeScheduler
from kvtransfer.blocks.admission import Admission, Need, Room
from kvtransfer.blocks.prefix import block_digests

log = structlog.get_logger(__name__)


class Residents:
    """Owns the engine's thread; everything else runs on the event loop."""

    def __init__(
        self,
        *,
        engine: Engine,
        scheduler: DecodeScheduler,
        model: CostModel,
        queue: AdmissionQueue[WaitingPrompt],
        occupancy: Occupancy,
        admission: Admission,
        fingerprint: str,
        counts: Counts,
        load: LoadReporter,
    ) -> None:
        self._queue, self.occupancy, self.ledger, self.admission = queue, occupancy, occupancy.ledger, admission
        self.line = RoomLine()
        """Handoffs that wait for room."""
        self._scheduler = scheduler
        self._block_tokens, self._fingerprint = engine.layout.block_tokens, fingerprint
        self.counts, self._load = counts, load
        self._held = occupancy.held
        self.runner = Runner(engine, scheduler, self, model)
        self.growth = Growth(occupancy, scheduler, self.runner, self._preempt, counts)

    def __len__(self) -> int:
        return len(self._held)

    def __iter__(self) -> Iterator[Resident]:
        return iter(self._held.values())

    def __contains__(self, key: AttemptKey) -> bool:
        return key in self._held

    @property
    def uncomputed(self) -> int:
        """Prompt tokens still to compute here, of started prompts."""
        return sum(resident.uncomputed for resident in self)

    def expected_s(self, ahead: int) -> float:
        """Roughly how long it takes until `ahead` sequences and one more have room: as many residents must end."""
        if not self._held:
            return 0.0
        left = sum(max(resident.need.likely - len(resident.tokens), 1) for resident in self)
        step_s = self.runner.model.cost.decode(len(self), sum(len(resident.tokens) for resident in self))
        return (ahead + 1) * left / len(self) * step_s / len(self)

    def add(self, resident: Resident, sequence: Sequence) -> None:
        self._held[resident.key.attempt] = resident
        self.runner.add(sequence)
        if self._scheduler.paused:
            self.check_backlogs()

    def start_waiting(self) -> None:
        """Gives what is free to residents that lack a block, then to those whose turn it is. To be called when room may
        have come free."""
        if self.growth.feed():
            while self._admit_next():
                pass
        self._load.changed()

    def check_backlogs(self) -> None:
        """Pauses the sequences of routers that are far behind, and lets those go on whose routers have caught up. To be
        called now and then: nothing else tells of a router that has caught up."""
        behind = {router for router in {resident.router for resident in self} if router.behind}
        paused = frozenset(key for key, resident in self._held.items() if resident.router in behind)
        if paused != self._scheduler.paused:
            self.counts.add("sequences_paused", len(paused - self._scheduler.paused))
            self._scheduler.paused = paused
            self.runner.between_steps(lambda: None)

    def cancel(self, attempt: AttemptKey) -> bool:
        """Takes the sequence out of the engine; frees and acknowledges it after that. False when it is not here."""
        resident = self._held.get(attempt)
        if resident is None:
            return False
        self._stop(resident, Freed(attempt))
        return True

    def _preempt(self, resident: Resident) -> None:
        self.counts.add("sequences_preempted")
        about = {"request": resident.spec.request_id, "attempt": resident.key.attempt.hex()[:12]}
        log.info("sequence preempted", **about, tokens=len(resident.tokens), times=resident.spec.preemptions + 1)
        self._stop(resident, Preempted(resident.key.attempt, 0))

    def on_step(self, report: StepReport) -> None:
        """An exception over one sequence ends that one alone."""
        tokens = StepTokens()
        for_each(report.items, lambda item: self._advanced(item, report, tokens), self._broken)
        tokens.send()
        over = [item for item in report.items if report.error or item.error or item.finish is not None]
        for_each(over, lambda item: self._finish(item, report), self._broken)
        self.start_waiting()

    def on_removed(self, key: AttemptKey) -> None:
        resident = self._held.get(key)
        if resident is not None and resident.farewell is not None:
            self._release(resident)

    def _admit_next(self) -> bool:
        """Lets the next sequence in, a prompt or a handoff; false where there is none, or no room for it yet."""
        prompt, parked = self._queue.turn(self._held.values(), self.runner.under_way_s), self.line.first
        if prompt is None or (parked is not None and parked.order < order_of(prompt.spec, prompt.arrived_at)):
            return parked is not None and self.occupancy.has_slot(parked.key.attempt) and self.line.admit(parked)
        need = Need.of(prompt.spec)
        usable = self.admission.usable(prompt.spec, prompt.digests)
        if not self.occupancy.has_slot() or not self.occupancy.admits(need, usable):
            return False
        room = self._queue.take(prompt, need.first)
        if room is not None:
            self._start(prompt, need, room)
        return room is not None

    def _start(self, prompt: WaitingPrompt, need: Need, room: Room) -> None:
        spec, cached, now = prompt.spec, room.cached_tokens, time.monotonic()
        here = PromptHere(room, prompt.digests, now, (now - prompt.received_at) * 1e3)
        key = HandoffKey(spec.attempt, 0)
        self.ledger.hold(key, room.blocks)
        prompt.router.send(Started(spec.attempt, here.queue_ms, cached))
        tokens = [*spec.prompt, *spec.output]
        resident = Resident(
            key, spec, need, prompt.router, tokens, prompt.arrived_at, now, cached, prompt=here, rank=prompt.rank
        )
        self.add(resident, Sequence.from_spec(spec, list(room.blocks), cached, prompt.rank, prompt.late))

    def _advanced(self, item: StepItem, report: StepReport, tokens: StepTokens) -> None:
        resident = self._held.get(item.key)
        if resident is None:
            self.counts.add("late_steps")
            return
        stopping = resident.state is ResidentState.STOPPING
        if resident.uncomputed:
            new = max(item.computed - resident.computed, 0)
            self.counts.add("prompt_tokens_wasted" if stopping else "prompt_tokens", new)
        resident.computed = max(resident.computed, item.computed)
        resident.sound = not item.error
        if stopping or not item.token_ids:
            return  # cancelled while the step ran, or in the middle of its prompt
        if resident.prompt is not None and resident.prompt.first_token_at is None:
            self._first_token(resident, resident.prompt, report.started + report.seconds)
        elif resident.first_step_at is None:
            resident.first_step_at = report.started
        resident.tokens.extend(item.token_ids)
        tokens.add(resident.router, TokenRun(item.key, item.position, item.token_ids, item.logprobs))
        if item.finish is None:
            self.growth.advanced(resident)

    def _first_token(self, resident: Resident, prompt: PromptHere, now: float) -> None:
        """From here on other prompts can find the computed blocks."""
        prompt.first_token_at = resident.resident_at = now
        self.admission.remember(list(prompt.room.blocks), prompt.digests)
        resident.router.send(prompt.report(resident.key.attempt))

    def _broken(self, item: StepItem, reason: str) -> None:
        self.counts.add("results_failed")
        resident = self._held.get(item.key)
        if resident is not None and resident.state is ResidentState.RUNNING:
            self._stop(resident, Ended(item.key, error=Internal(f"decode failed: {reason}")))

    def _stop(self, resident: Resident, farewell: Freed | Ended | Preempted) -> None:
        resident.farewell = farewell
        if resident.state is ResidentState.RUNNING:
            resident.state = ResidentState.STOPPING
            self.runner.remove(resident.key.attempt)

    def _finish(self, item: StepItem, report: StepReport) -> None:
        resident = self._held.get(item.key)
        if resident is None or resident.state is not ResidentState.RUNNING:
            return
        first_step_wait_ms = decode_ms = None
        if resident.first_step_at is not None:
            first_step_wait_ms = (resident.first_step_at - resident.resident_at) * 1e3
            decode_ms = (report.started + report.seconds - resident.first_step_at) * 1e3
        failed = item.error or (f"decode failed: {report.error}" if report.error else "")
        if failed:
            self.counts.add("sequences_failed")
        self._release(resident)
        resident.router.send(
            Ended(
                item.key,
                reason=item.finish,
                error=Internal(failed) if failed else None,
                output_tokens=len(resident.tokens) - len(resident.spec.prompt),
                first_step_wait_ms=first_step_wait_ms,
                decode_ms=decode_ms,
            )
        )

    def _release(self, resident: Resident) -> None:
        """Blocks whose tokens are all computed stay in the prefix cache for the next turn; the last token never is. Of
        a sequence that is not sound, only blocks stay that were there before it. The router hears of the end before
        anything else can have the room."""
        digests: list[bytes] = []
        if resident.sound:
            computed = resident.tokens[: resident.computed]
            digests = block_digests(computed, self._block_tokens, resident.spec.tenant_salt, self._fingerprint)
        else:
            self.ledger.pool.forget(self._new_blocks(resident))
        del self._held[resident.key.attempt]
        resident.state = ResidentState.RELEASED
        self.ledger.release(resident.key, awake.now(), digests)
        farewell = resident.farewell
        if isinstance(farewell, Preempted):
            cached = self.ledger.pool.peek(digests) * self._block_tokens
            farewell = replace(farewell, cached_tokens=cached)
        if farewell is not None:
            resident.router.send(farewell)
        self.start_waiting()

    def _new_blocks(self, resident: Resident) -> list[int]:
        """Those that were not found in the cache."""
        grant, prompt = self.ledger.grant(resident.key), resident.prompt
        assert grant is not None, "a resident has a grant"
        found = prompt.room.cached_tokens // self._block_tokens if prompt else grant.ticket.cached_blocks
        return self.ledger.table(resident.key)[found:]
