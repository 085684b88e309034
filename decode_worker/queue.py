"""Prompts that wait to be computed in place, in chunks beside the residents' steps."""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass, field

from baton.cost import CostModel
from baton.errors import ResourceExhausted
from baton.spec import AttemptKey, SequenceSpec
from baton.worker.prompt_queue import PromptQueue
from baton.worker.session import RouterSession
from decode_worker.records import Resident
from kvtransfer.blocks.admission import Admission, Room


@dataclass(slots=True)
class WaitingPrompt:
    """`received_at` is monotonic seconds; `rank`, `work_s` and `late` are the queue's."""

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


class DirectQueue:
    """Starts a prompt when blocks for its whole length are free and the engine has less than two chunks ahead of it."""

    def __init__(self, admission: Admission, model: CostModel, chunk_tokens: int) -> None:
        self._admission, self._model, self._chunk_tokens = admission, model, chunk_tokens
        self._queue: PromptQueue[WaitingPrompt] = PromptQueue()
        self._waiting: dict[AttemptKey, WaitingPrompt] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, attempt: AttemptKey) -> bool:
        return attempt in self._waiting

    @property
    def tokens(self) -> int:
        """Of all waiting prompts."""
        return self._queue.tokens

    def push(self, router: RouterSession, spec: SequenceSpec) -> None:
        """Raises ResourceExhausted for a prompt that the pool could never hold."""
        if obstacle := self._admission.obstacle(spec.kv_tokens):
            raise ResourceExhausted(obstacle)
        prompt = WaitingPrompt(spec, router, self._admission.digests(spec))
        cached = self._admission.cached(spec, prompt.digests)
        self._waiting[spec.attempt] = prompt
        self._queue.push(prompt, self._model.cost.prefill(spec.known_tokens - cached, cached, self._chunk_tokens))

    def next(self, residents: Collection[Resident], under_way_s: float) -> tuple[WaitingPrompt, Room] | None:
        """The prompt that starts now, with its room; None when none does. `under_way_s` is the age of the step under
        way."""

        def ahead(prompt: WaitingPrompt) -> int:
            return sum(resident.uncomputed for resident in residents if resident.rank <= prompt.rank)

        def ahead_s(prompt: WaitingPrompt) -> float:
            return max(0.0, self._model.cost.prefill(ahead(prompt), 0, self._chunk_tokens) - under_way_s)

        prompt = self._queue.first(time.monotonic(), ahead_s)
        if prompt is None or ahead(prompt) >= 2 * self._chunk_tokens:
            return None
        room = self._admission.reserve(prompt.spec, prompt.digests, prompt.spec.kv_tokens)
        if room is None:
            return None
        self.remove(prompt.key)
        return prompt, room

    def remove(self, attempt: AttemptKey) -> bool:
        """False when it does not wait."""
        prompt = self._waiting.pop(attempt, None)
        if prompt is not None:
            self._queue.remove(prompt)
        return prompt is not None

    def of_router(self, router: RouterSession) -> set[AttemptKey]:
        """What waits for that router."""
        return {prompt.key for prompt in self._waiting.values() if prompt.router is router}
