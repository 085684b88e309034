"""Prompts that wait for blocks, and for their turn."""

from __future__ import annotations

import time
from collections.abc import Collection

from baton.cost import CostModel
from baton.errors import ResourceExhausted
from baton.worker.prompt_queue import PromptQueue
from kvtransfer.blocks.admission import Admission
from prefill_worker.prompt import Prompt


class PrefillQueue:
    """Starts a prompt when the engine has less than two chunks ahead of it and decode workers keep up."""

    def __init__(self, admission: Admission, model: CostModel, chunk_tokens: int, max_ungranted: int) -> None:
        self._admission, self._model = admission, model
        self._chunk_tokens, self._max_ungranted = chunk_tokens, max_ungranted
        self._waiting: PromptQueue[Prompt] = PromptQueue()

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def tokens(self) -> int:
        """Of all waiting prompts."""
        return self._waiting.tokens

    def push(self, prompt: Prompt) -> None:
        """Raises ResourceExhausted for a prompt that the pool could never hold."""
        spec = prompt.spec
        if obstacle := self._admission.obstacle(spec.known_tokens):
            raise ResourceExhausted(obstacle)
        prompt.digests = self._admission.digests(spec)
        cached = self._admission.cached(spec, prompt.digests)
        self._waiting.push(prompt, self._model.cost.prefill(spec.known_tokens - cached, cached, self._chunk_tokens))

    def remove(self, prompt: Prompt) -> None:
        """Nothing happens when it does not wait."""
        self._waiting.remove(prompt)

    def next(self, started: Collection[Prompt], under_way_s: float) -> Prompt | None:
        """The prompt that starts now, with its blocks; None when none does. `under_way_s` is the age of the step under
        way."""

        def ahead_s(prompt: Prompt) -> float:
            ahead = prompt.tokens_ahead(started)
            return max(0.0, self._model.cost.prefill(ahead, 0, self._chunk_tokens) - under_way_s)

        prompt = self._waiting.first(time.monotonic(), ahead_s)
        if prompt is None or prompt.tokens_ahead(started) >= 2 * self._chunk_tokens:
            return None
        if sum(not other.granted for other in started) >= self._max_ungranted:
            return None
        room = self._admission.reserve(prompt.spec, prompt.digests, prompt.spec.known_tokens)
        if room is None:
            return None
        self._waiting.remove(prompt)
        prompt.blocks, prompt.cached_tokens = list(room.blocks), room.cached_tokens
        return prompt
