"""Prompts that wait."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from prefill_worker.attempt import Attempt
from prefill_worker.queue import PromptQueue
from tests.prefill_worker.builders import attempt


class QueueMachine(RuleBasedStateMachine):
    """Against a sorted list."""

    def __init__(self) -> None:
        super().__init__()
        self.queue = PromptQueue()
        self.model: list[Attempt] = []
        self.gone: list[Attempt] = []

    @rule(priority=st.integers(-2, 2), length=st.integers(1, 9))
    def push(self, priority: int, length: int) -> None:
        new = attempt(length, priority=priority)
        self.queue.push(new)
        behind = [i for i, other in enumerate(self.model) if other.spec.priority < priority]
        self.model.insert(behind[0] if behind else len(self.model), new)

    @rule()
    def start(self) -> None:
        first = self.queue.first()
        assert first is (self.model[0] if self.model else None)
        if first is not None:
            self.queue.remove(first)
            self.gone.append(self.model.pop(0))

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        if self.model:
            index = data.draw(st.integers(0, len(self.model) - 1))
            self.queue.remove(self.model[index])
            self.gone.append(self.model.pop(index))

    @rule()
    def remove_again(self) -> None:
        for former in self.gone:
            self.queue.remove(former)

    @invariant()
    def counts(self) -> None:
        assert len(self.queue) == len(self.model)
        assert self.queue.tokens == sum(waiting.spec.known_tokens for waiting in self.model)


TestQueue = QueueMachine.TestCase


def test_output_of_earlier_attempts_counts() -> None:
    queue = PromptQueue()
    queue.push(attempt(5, output=(1, 2), max_tokens=9))
    assert queue.tokens == 7
