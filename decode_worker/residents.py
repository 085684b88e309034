"""The sequences that the engine has: their steps become tokens, their ends free their blocks.

A sequence comes here resident (its KV was handed over) or as a prompt to be computed in place. Its blocks are freed by
`_release`, and only after the engine has confirmed, by the step that finished it or by `on_removed`, that no step
touches them any more.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from baton.cost import CostModel
from baton.engine.api import Engine, Sequence
from baton.rpc.convert import run_to_wire
from baton.spec import AttemptKey
from baton.telemetry import Counts
from baton.v1 import worker_pb2 as wire
from baton.worker.results import TokenFrames, for_each
from baton.worker.runner import Runner, StepItem, StepReport
from decode_worker.records import Resident
from decode_worker.scheduler import DecodeScheduler
from kvtransfer.blocks.admission import Admission
from kvtransfer.blocks.pool import BlockPool
from kvtransfer.blocks.prefix import block_digests
from kvtransfer.handoffs.grants import GrantLedger

INTERNAL = 13  # google.rpc.Code


class Residents:
    """Implements `StepEvents`. `changed` is called after whatever a router places by; all on the event loop."""

    def __init__(
        self,
        engine: Engine,
        scheduler: DecodeScheduler,
        model: CostModel,
        ledger: GrantLedger,
        pool: BlockPool,
        admission: Admission,
        fingerprint: str,
        counts: Counts,
        changed: Callable[[], None],
    ) -> None:
        self._ledger, self._pool, self._admission = ledger, pool, admission
        self._block_tokens, self._fingerprint = engine.layout.block_tokens, fingerprint
        self._counts, self._changed = counts, changed
        self._held: dict[AttemptKey, Resident] = {}
        self.runner = Runner(engine, scheduler, self, model)

    def __len__(self) -> int:
        return len(self._held)

    def __iter__(self) -> Iterator[Resident]:
        return iter(self._held.values())

    def __contains__(self, key: AttemptKey) -> bool:
        return key in self._held

    def add(self, resident: Resident, sequence: Sequence) -> None:
        """The engine gets it."""
        self._held[resident.key.attempt] = resident
        self.runner.add(sequence)

    def cancel(self, attempt: AttemptKey) -> bool:
        """Takes it out of the engine, after which it is freed and acknowledged. False when it is not here."""
        resident = self._held.get(attempt)
        if resident is None:
            return False
        resident.failure = ""
        if not resident.ending:
            resident.ending = True
            self.runner.remove(attempt)
        return True

    def on_step(self, report: StepReport) -> None:
        """See `StepEvents`. One frame per router carries the tokens of all its sequences; what raises for one sequence
        ends that one alone."""
        frames = TokenFrames()
        for_each(report.items, lambda item: self._advanced(item, report, frames), self._broken)
        frames.send()
        over = report.items if report.error else [item for item in report.items if item.finish is not None]
        for_each(over, lambda item: self._finish(item, report), self._broken)
        self._changed()

    def on_removed(self, key: AttemptKey) -> None:
        """See `StepEvents`: the engine has let go of a sequence that was cancelled, or could not go on."""
        resident = self._held.get(key)
        if resident is None:
            return
        self._release(resident)
        if resident.failure:
            ended = wire.Ended(attempt=key, status=INTERNAL, message=f"decode failed: {resident.failure}")
            resident.router.send(ended=ended)
        else:
            resident.router.send(freed=wire.Freed(attempt=key))

    def _advanced(self, item: StepItem, report: StepReport, frames: TokenFrames) -> None:
        resident = self._held.get(item.key)
        if resident is None:
            self._counts.add("late_steps")
            return
        if resident.uncomputed:
            new = max(item.computed - resident.computed, 0)
            self._counts.add("prompt_tokens_wasted" if resident.ending else "prompt_tokens", new)
        resident.computed = max(resident.computed, item.computed)
        if resident.ending or not item.token_ids:
            return  # cancelled while the step ran, or in the middle of its prompt
        if resident.prompt is not None and resident.prompt.first_token_at is None:
            self._first_token(resident, report.started + report.seconds)
        elif resident.first_step_at is None:
            resident.first_step_at = report.started
        resident.tokens.extend(item.token_ids)
        frames.add(resident.router, run_to_wire(item.key, item.position, item.token_ids, item.logprobs))

    def _first_token(self, resident: Resident, now: float) -> None:
        """A prompt that was computed here is resident now; its blocks can be found."""
        prompt = resident.prompt
        assert prompt is not None, "computed here"
        prompt.first_token_at = resident.resident_at = now
        self._admission.remember(list(prompt.room.blocks), prompt.digests)
        resident.router.send(prefill_report=prompt.report(resident.key.attempt))

    def _broken(self, item: StepItem, reason: str) -> None:
        """Ends the sequence, once no step touches its blocks."""
        self._counts.add("results_failed")
        resident = self._held.get(item.key)
        if resident is not None and not resident.ending:
            resident.ending, resident.failure = True, reason
            self.runner.remove(item.key)

    def _finish(self, item: StepItem, report: StepReport) -> None:
        resident = self._held.get(item.key)
        if resident is None or resident.ending:
            return
        ended = wire.Ended(attempt=item.key, output_tokens=len(resident.tokens) - len(resident.spec.prompt))
        if report.error:
            ended.status, ended.message = INTERNAL, f"decode failed: {report.error}"
        elif item.finish is not None:
            ended.reason = int(item.finish)  # type: ignore[assignment]  # the same numbers
        if resident.first_step_at is not None:
            ended.first_step_wait_ms = (resident.first_step_at - resident.resident_at) * 1e3
            ended.decode_ms = (report.started + report.seconds - resident.first_step_at) * 1e3
        self._release(resident)
        resident.router.send(ended=ended)

    def _release(self, resident: Resident) -> None:
        """Blocks whose tokens were all computed stay in the prefix cache for a next turn: the last token is not."""
        computed = resident.tokens[: resident.computed]
        digests = block_digests(computed, self._block_tokens, resident.spec.tenant_salt, self._fingerprint)
        del self._held[resident.key.attempt]
        if resident.prompt is None:
            self._ledger.release(resident.key, time.monotonic(), digests)
        else:
            blocks = list(resident.prompt.room.blocks)
            self._admission.remember(blocks, digests)
            self._pool.release(blocks)
        self._changed()
