"""Prompts that wait to be computed on this worker, for their turn and for blocks."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from baton.cost import CostModel
from baton.errors import ResourceExhausted
from baton.spec import AttemptKey, SequenceSpec
from baton.worker.prompt_queue import PromptQueue
from baton.worker.session import RouterSession
from kvtransfer.blocks.admission import Admission, Room


@dataclass(slots=True)
class WaitingPrompt:
    """`received_at` is monotonic seconds; the queue sets `digests`, `rank`, `work_s` and `late`."""

    spec: SequenceSpec
    router: RouterSession
    digests: list[bytes] = field(default_factory=list)
    received_at: float = field(default_factory=time.monotonic)
    rank: float = 0.0
    work_s: float = 0.0
    late: bool = False

    @property
    def key(self) -> AttemptKey:
        return self.spec.attempt


class Computing(Protocol):
    """A sequence in the engine; `uncomputed` counts its prompt tokens still to compute."""

    rank: float

    @property
    def uncomputed(self) -> int: ...


P = TypeVar("P", bound=WaitingPrompt)


class AdmissionQueue(PromptQueue[P]):
    """Starts a prompt when the pool has blocks for it and the engine has less than two chunks ahead of it."""

    def __init__(
        self, admission: Admission, model: CostModel, chunk_tokens: int, positions: Callable[[SequenceSpec], int]
    ) -> None:
        """`positions`: how many a sequence needs blocks for."""
        super().__init__()
        self._admission, self._model = admission, model
        self._chunk_tokens, self._positions = chunk_tokens, positions

    def add(self, prompt: P) -> None:
        """Raises ResourceExhausted for a prompt that the pool could never hold."""
        spec = prompt.spec
        if obstacle := self._admission.obstacle(self._positions(spec)):
            raise ResourceExhausted(obstacle)
        prompt.digests = self._admission.digests(spec)
        cached = self._admission.cached(spec, prompt.digests)
        self.push(prompt, self._model.cost.prefill(spec.known_tokens - cached, cached, self._chunk_tokens))

    def next(
        self, computing: Collection[Computing], under_way_s: float, may_start: bool = True
    ) -> tuple[P, Room] | None:
        """Takes out the prompt that starts now, with its blocks. `under_way_s` is the age of the step under way."""

        def ahead(prompt: P) -> int:
            return sum(other.uncomputed for other in computing if other.rank <= prompt.rank)

        def ahead_s(prompt: P) -> float:
            return max(0.0, self._model.cost.prefill(ahead(prompt), 0, self._chunk_tokens) - under_way_s)

        prompt = self.first(time.monotonic(), ahead_s)
        if prompt is None or ahead(prompt) >= 2 * self._chunk_tokens or not may_start:
            return None
        room = self._admission.reserve(prompt.spec, prompt.digests, self._positions(prompt.spec))
        if room is None:
            return None
        self.remove(prompt.key)
        return prompt, room
