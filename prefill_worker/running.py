"""The life of the prompts on this worker: the engine's steps become tokens, and ends free blocks."""

from __future__ import annotations

import time
from collections.abc import Iterator

from baton.cost import CostModel
from baton.engine.api import Engine
from baton.errors import BatonError, Internal
from baton.messages import Ended, Started, TokenRun
from baton.rpc import awake
from baton.spec import AttemptKey
from baton.telemetry import Counts
from baton.worker.admission_queue import AdmissionQueue
from baton.worker.load import LoadReporter
from baton.worker.runner import Runner, StepItem, StepReport, for_each
from baton.worker.session import StepTokens
from kvtransfer.blocks.admission import Admission, Room
from kvtransfer.blocks.pool import BlockPool
from kvtransfer.handoffs.leases import LeaseTable
from prefill_worker.prompt import Prompt, PromptState
from prefill_worker.scheduler import PrefillScheduler

HOLD_S = 120.0
"""How long a computed prompt is kept without a handoff under way; the router binds it again sooner."""
TOMBSTONE_S = 120.0
TOMBSTONES = 100_000
"""How long attempts that are over are remembered, and how many: beyond that, the oldest is forgotten early."""


class Prompts:
    """Owns the prompts, their blocks and the engine's thread. Everything runs on the event loop but the engine."""

    def __init__(
        self,
        engine: Engine,
        scheduler: PrefillScheduler,
        model: CostModel,
        queue: AdmissionQueue[Prompt],
        max_ungranted: int,
        pool: BlockPool,
        admission: Admission,
        counts: Counts,
        load: LoadReporter,
    ) -> None:
        self._queue, self._max_ungranted, self._pool, self._admission = queue, max_ungranted, pool, admission
        self._counts, self._load = counts, load
        self._prompts: dict[AttemptKey, Prompt] = {}
        self._started: dict[AttemptKey, Prompt] = {}
        self.tombstones: LeaseTable[AttemptKey] = LeaseTable()
        self.runner = Runner(engine, scheduler, self, model)

    def __len__(self) -> int:
        return len(self._prompts)

    def __iter__(self) -> Iterator[Prompt]:
        return iter(list(self._prompts.values()))

    @property
    def started(self) -> int:
        """Prompts that have blocks."""
        return len(self._started)

    @property
    def computing_tokens(self) -> int:
        return sum(prompt.uncomputed for prompt in self._in_engine())

    def find(self, key: AttemptKey) -> Prompt | None:
        return self._prompts.get(key)

    def add(self, prompt: Prompt) -> None:
        """Queues a prompt. Raises ResourceExhausted for one that the pool could never hold."""
        self._queue.add(prompt)
        self._prompts[prompt.key] = prompt
        self.start_waiting()

    def start_waiting(self) -> None:
        """To be called when blocks have come free or a grant has come: starts prompts, if decode workers keep up."""
        while self._may_start():
            prompt = self._queue.turn(self._in_engine(), self.runner.under_way_s)
            if prompt is None or (room := self._queue.take(prompt, prompt.spec.known_tokens)) is None:
                break
            self._start(prompt, room)
        self._load.changed()

    def fail(self, prompt: Prompt, error: BatonError) -> None:
        prompt.router.send(Ended(prompt.key, error=error))
        self.end(prompt)

    def end(self, prompt: Prompt) -> None:
        """Stops all work for the prompt; its blocks are freed once neither step nor write touches them."""
        if not prompt.over:
            in_engine = prompt.state is PromptState.COMPUTING
            prompt.state = PromptState.STOPPING if in_engine else PromptState.DRAINING
            self._queue.remove(prompt.key)
            prompt.drop_handoff("the attempt is over")
            if in_engine:
                self.runner.remove(prompt.key)
        self.release_if_idle(prompt)

    def release_if_idle(self, prompt: Prompt) -> None:
        """Frees the blocks of a prompt that is over, unless a step or a write may touch them."""
        if prompt.state is not PromptState.DRAINING or prompt.writing:
            return
        prompt.state = PromptState.RELEASED
        del self._prompts[prompt.key]
        self.bury(prompt.key)
        self._started.pop(prompt.key, None)
        self._pool.release(prompt.blocks)
        if prompt.handed_over:  # not earlier: the last write may return after the news that it arrived
            prompt.router.send(prompt.report())
        for event in prompt.farewell:
            prompt.router.send(event)
        self.start_waiting()

    def bury(self, key: AttemptKey) -> None:
        """Late commands for the attempt must not bring it back."""
        self.tombstones.grant(key, awake.now(), TOMBSTONE_S)
        if len(self.tombstones) > TOMBSTONES:
            self.tombstones.pop_earliest()

    def on_step(self, report: StepReport) -> None:
        """An exception over one sequence ends that one alone."""
        tokens = StepTokens()
        for_each(report.items, lambda item: self._computed(item, report, tokens), self._broken)
        tokens.send()
        drawn = [item for item in report.items if item.token_ids]
        for_each(drawn, lambda item: self._first_token(item, report.started + report.seconds), self._broken)
        self.start_waiting()

    def on_removed(self, key: AttemptKey) -> None:
        prompt = self._prompts.get(key)
        if prompt is not None and prompt.state is PromptState.STOPPING:
            prompt.state = PromptState.DRAINING
            self.release_if_idle(prompt)

    def _in_engine(self) -> list[Prompt]:
        return [prompt for prompt in self._started.values() if prompt.in_engine]

    def _may_start(self) -> bool:
        """Few prompts may lack a grant. Those in a decode worker's line have half of the pool instead."""
        ungranted = [prompt for prompt in self._started.values() if not prompt.granted]
        parked = [len(prompt.blocks) for prompt in ungranted if prompt.parked]
        return len(ungranted) - len(parked) < self._max_ungranted and sum(parked) < self._pool.blocks // 2

    def _start(self, prompt: Prompt, room: Room) -> None:
        prompt.blocks, prompt.cached_tokens = list(room.blocks), room.cached_tokens
        self._started[prompt.key] = prompt
        prompt.state = PromptState.COMPUTING
        prompt.started_at = time.monotonic()
        prompt.computed = prompt.cached_tokens
        self.runner.add(prompt.sequence())
        prompt.router.send(Started(prompt.key, prompt.queue_ms, prompt.cached_tokens))

    def _computed(self, item: StepItem, report: StepReport, tokens: StepTokens) -> None:
        prompt = self._prompts.get(item.key)
        if prompt is None:
            self._counts.add("late_steps")
            return
        self._counts.add("prompt_tokens_wasted" if prompt.over else "prompt_tokens", prompt.advance(item.computed))
        if prompt.over:
            return  # `on_removed` follows
        failed = item.error or (f"prefill failed: {report.error}" if report.error else "")
        if item.token_ids or failed:
            prompt.state = PromptState.HELD
        if failed:  # nothing of it is in the prefix index, which it would enter with its first token
            self._counts.add("sequences_failed")
            self.fail(prompt, Internal(failed))
        elif item.token_ids:
            tokens.add(prompt.router, TokenRun(item.key, item.position, item.token_ids, item.logprobs))
        else:
            prompt.tell_progress()

    def _first_token(self, item: StepItem, now: float) -> None:
        prompt = self._prompts.get(item.key)
        if prompt is None or prompt.over:
            return
        prompt.first, prompt.first_token_at = item, now
        self._admission.remember(prompt.blocks, prompt.digests)
        if item.finish is not None:  # no worker needs the KV
            prompt.router.send(prompt.report())
            prompt.router.send(Ended(prompt.key, item.finish, output_tokens=len(prompt.spec.output) + 1))
            self.end(prompt)
            return
        prompt.hold_until = awake.now() + HOLD_S
        prompt.tell_progress()

    def _broken(self, item: StepItem, reason: str) -> None:
        self._counts.add("results_failed")
        prompt = self._prompts.get(item.key)
        if prompt is not None and not prompt.over:
            self.fail(prompt, Internal(f"prefill failed: {reason}"))
