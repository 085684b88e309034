"""Prompts that a decode worker computes itself, in chunks beside its residents' steps.

    WAITING -> COMPUTING (chunks) -> RESIDENT -> RELEASED       from COMPUTING on `residents` has it

A prompt starts when a sequence slot and blocks for its whole length are free. It is then a resident whose KV is not
complete yet: nothing is transferred, and nothing can be refused any more.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from baton.cost import StepCost
from baton.engine.api import Sequence
from baton.errors import InvalidArgument
from baton.rpc.convert import spec_from_wire
from baton.spec import AttemptKey, HandoffKey, SequenceSpec
from baton.telemetry import Counts
from baton.v1 import worker_pb2 as wire
from baton.worker.prompt_queue import PromptQueue
from baton.worker.service import RouterSession
from decode_worker.records import PromptHere, Resident
from decode_worker.residents import Residents
from kvtransfer.blocks.admission import Admission

INTERNAL, EXHAUSTED = 13, 8  # google.rpc.Code


@dataclass(slots=True)
class WaitingPrompt:
    """Implements `baton.worker.prompt_queue.Waiting`."""

    spec: SequenceSpec
    router: RouterSession
    digests: list[bytes]
    received_at: float = field(default_factory=time.monotonic)
    rank: float = 0.0
    work_s: float = 0.0
    late: bool = False

    @property
    def key(self) -> AttemptKey:
        return self.spec.attempt


class DirectPrompts:
    """Those that wait, and how they start. `has_slot` says whether one more sequence may run; `is_cancelled` whether an
    attempt's cancel has come already, as it may before a prompt that is sent in parts."""

    def __init__(
        self,
        residents: Residents,
        admission: Admission,
        cost: Callable[[], StepCost],
        chunk_tokens: int,
        has_slot: Callable[[], bool],
        is_cancelled: Callable[[AttemptKey], bool],
        counts: Counts,
    ) -> None:
        self._residents, self._admission, self._cost = residents, admission, cost
        self._chunk_tokens, self._has_slot, self._counts = chunk_tokens, has_slot, counts
        self._is_cancelled = is_cancelled
        self._queue: PromptQueue[WaitingPrompt] = PromptQueue()
        self._waiting: dict[AttemptKey, WaitingPrompt] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def tokens(self) -> int:
        """Prompt tokens still to compute, those of started prompts included."""
        return self._queue.tokens + sum(resident.uncomputed for resident in self._residents)

    def command(self, router: RouterSession, message: wire.SequenceSpec) -> None:
        """A router wants this prompt computed and decoded here."""
        try:
            spec = spec_from_wire(message)
        except InvalidArgument as error:
            router.send(ended=wire.Ended(attempt=message.attempt, status=INTERNAL, message=str(error)))
            return
        if spec.attempt in self._waiting or spec.attempt in self._residents:
            self._counts.add("duplicate_messages")
            return
        if self._is_cancelled(spec.attempt):  # its cancel came first, and was acknowledged
            self._counts.add("late_messages")
            return
        if obstacle := self._admission.obstacle(spec.kv_tokens):
            router.send(ended=wire.Ended(attempt=spec.attempt, status=EXHAUSTED, message=obstacle))
            return
        prompt = WaitingPrompt(spec, router, self._admission.digests(spec))
        cached = self._admission.cached(spec, prompt.digests)
        self._waiting[spec.attempt] = prompt
        self._queue.push(prompt, self._cost().prefill(spec.known_tokens - cached, cached, self._chunk_tokens))
        self.start_waiting()

    def start_waiting(self) -> None:
        """Starts prompts in turn, while there is room and the engine has less than two chunks of them ahead."""
        while (prompt := self._queue.first(time.monotonic(), self._ahead_s)) is not None and self._has_slot():
            if self._ahead(prompt) >= 2 * self._chunk_tokens:
                break
            room = self._admission.reserve(prompt.spec, prompt.digests, prompt.spec.kv_tokens)
            if room is None:
                break
            self._forget(prompt)
            now = time.monotonic()
            here = PromptHere(room, prompt.digests, now, (now - prompt.received_at) * 1e3)
            self._start(prompt, here)

    def cancel(self, attempt: AttemptKey) -> bool:
        """False when it does not wait."""
        prompt = self._waiting.get(attempt)
        if prompt is None:
            return False
        self._forget(prompt)
        return True

    def of_router(self, router: RouterSession) -> list[AttemptKey]:
        """What waits for that router."""
        return [prompt.key for prompt in self._waiting.values() if prompt.router is router]

    def _ahead(self, prompt: WaitingPrompt) -> int:
        """Prompt tokens in the engine that go first."""
        return sum(resident.uncomputed for resident in self._residents if resident.rank <= prompt.rank)

    def _ahead_s(self, prompt: WaitingPrompt) -> float:
        work_s = self._cost().prefill(self._ahead(prompt), 0, self._chunk_tokens)
        return max(0.0, work_s - self._residents.runner.under_way_s)

    def _start(self, prompt: WaitingPrompt, here: PromptHere) -> None:
        spec, cached = prompt.spec, here.room.cached_tokens
        known, blocks = [*spec.prompt, *spec.output], list(here.room.blocks)
        key = HandoffKey(spec.attempt, 0)
        resident = Resident(key, spec, prompt.router, known, here.started_at, cached, prompt=here, rank=prompt.rank)
        prompt.router.send(started=wire.Started(attempt=spec.attempt, queue_ms=here.queue_ms, cached_tokens=cached))
        self._residents.add(resident, Sequence.from_spec(spec, blocks, cached, prompt.rank, prompt.late))

    def _forget(self, prompt: WaitingPrompt) -> None:
        del self._waiting[prompt.key]
        self._queue.remove(prompt)
