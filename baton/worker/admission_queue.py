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

    @property
    def arrived_at(self) -> float:
        """When the request arrived at its router, in this worker's monotonic seconds."""
        return self.received_at - self.spec.age_s


class Computing(Protocol):
    """A sequence in the engine; `uncomputed` counts its prompt tokens still to compute."""

    rank: float

    @property
    def uncomputed(self) -> int: ...


P = TypeVar("P", bound=WaitingPrompt)


class AdmissionQueue(PromptQueue[P]):
    """A prompt's turn comes when the engine has less than two chunks ahead of it, and it starts with blocks."""

    def __init__(
        self, admission: Admission, model: CostModel, chunk_tokens: int, most: Callable[[SequenceSpec], int]
    ) -> None:
        """`most`: how many positions a sequence may need blocks for."""
        super().__init__()
        self._admission, self._model = admission, model
        self._chunk_tokens, self._most = chunk_tokens, most

    def add(self, prompt: P) -> None:
        """Raises ResourceExhausted for a prompt that the pool could never hold."""
        spec = prompt.spec
        if obstacle := self._admission.obstacle(self._most(spec)):
            raise ResourceExhausted(obstacle)
        prompt.digests = self._admission.digests(spec)
        cached = self._admission.cached(spec, prompt.digests)
        self.push(prompt, self._model.cost.prefill(spec.known_tokens - cached, cached, self._chunk_tokens))

    def turn(self, computing: Collection[Computing], under_way_s: float) -> P | None:
        """The prompt that can start now; it stays until it is taken. `under_way_s` is the age of the step under way."""

        def ahead(prompt: P) -> int:
            return sum(other.uncomputed for other in computing if other.rank <= prompt.rank)

        def ahead_s(prompt: P) -> float:
            return max(0.0, self._model.cost.prefill(ahead(prompt), 0, self._chunk_tokens) - under_way_s)

        prompt = self.first(time.monotonic(), ahead_s)
        return None if prompt is None or ahead(prompt) >= 2 * self._chunk_tokens else prompt

    def take(self, prompt: P, positions: int) -> Room | None:
        """Takes the prompt out, with blocks for so many positions; None, and no change, without room."""
        room = self._admission.reserve(prompt.spec, prompt.digests, positions)
        if room is not None:
            self.remove(prompt.key)
        return room
