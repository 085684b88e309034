"""Prompts that wait: the first due goes first, and none waits for ever."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from baton.worker.prompt_queue import AGEING_S, PRIORITY_S, PromptQueue
from prefill_worker.prompt import Prompt
from tests.prefill_worker import builders

NOW = 1000.0


def waiting(left: float | None = None, at: float = NOW, priority: int = 0, length: int = 5) -> Prompt:
    made = builders.waiting(length, ttft_left_s=left, priority=priority)
    made.received_at = at
    return made


class QueueMachine(RuleBasedStateMachine):
    """Against a sorted list."""

    def __init__(self) -> None:
        super().__init__()
        self.queue: PromptQueue[Prompt] = PromptQueue()
        self.model: list[tuple[float, Prompt]] = []
        self.gone: list[Prompt] = []

    @rule(
        priority=st.integers(-2, 2),
        length=st.integers(1, 9),
        left=st.none() | st.floats(0.5, 60),
        work=st.floats(0, 0.4),
    )
    def push(self, priority: int, length: int, left: float | None, work: float) -> None:
        new = waiting(left, NOW, priority, length)
        self.queue.push(new, work)
        due = NOW + (AGEING_S if left is None else left)
        self.model.append((due - PRIORITY_S * priority, new))
        self.model.sort(key=lambda entry: entry[0])

    @rule()
    def start(self) -> None:
        first = self.queue.first(NOW)
        assert first is (self.model[0][1] if self.model else None)
        if first is not None:
            self.queue.remove(first.key)
            self.gone.append(self.model.pop(0)[1])

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        if self.model:
            index = data.draw(st.integers(0, len(self.model) - 1))
            self.queue.remove(self.model[index][1].key)
            self.gone.append(self.model.pop(index)[1])

    @rule()
    def remove_again(self) -> None:
        for former in self.gone:
            assert not self.queue.remove(former.key)

    @invariant()
    def counts(self) -> None:
        assert len(self.queue) == len(self.model)
        assert self.queue.tokens == sum(entry.spec.known_tokens for _, entry in self.model)


TestQueue = QueueMachine.TestCase


def queue_of(*prompts: tuple[Prompt, float]) -> PromptQueue[Prompt]:
    queue: PromptQueue[Prompt] = PromptQueue()
    for prompt, work in prompts:
        queue.push(prompt, work)
    return queue


def drain(queue: PromptQueue[Prompt], now: float) -> list[Prompt]:
    order = []
    while (first := queue.first(now)) is not None:
        queue.remove(first.key)
        order.append(first)
    return order


def test_output_of_earlier_attempts_counts() -> None:
    queue: PromptQueue[Prompt] = PromptQueue()
    queue.push(builders.waiting(5, output=(1, 2), max_tokens=9), 0.0)
    assert queue.tokens == 7


def test_a_short_urgent_prompt_goes_before_ten_long_ones() -> None:
    long = [waiting(20.0) for _ in range(10)]
    urgent = waiting(1.0, NOW + 0.1)
    queue = queue_of(*((prompt, 2.0) for prompt in long), (urgent, 0.1))
    assert drain(queue, NOW + 0.2) == [urgent, *long]


def test_of_equal_objectives_the_first_to_come_goes_first_however_long_the_next_is() -> None:
    short, long = waiting(3.0), waiting(3.0, NOW + 0.5)
    assert drain(queue_of((short, 0.1), (long, 2.0)), NOW + 0.5) == [short, long]


def test_work_is_taken_off_the_time_that_is_left() -> None:
    hopeless, kept = waiting(1.0), waiting(1.5)
    assert drain(queue_of((hopeless, 1.4), (kept, 1.4)), NOW) == [kept, hopeless]


def test_what_has_started_is_taken_off_too() -> None:
    """Two seconds of work have started before them: the first one can't be in time behind that."""
    hopeless, kept = waiting(2.5), waiting(5.0)
    queue = queue_of((hopeless, 1.0), (kept, 1.0))
    assert queue.first(NOW, lambda _: 1.0) is hopeless
    assert queue.first(NOW, lambda _: 2.0) is kept


def test_who_may_still_be_in_time_keeps_its_turn() -> None:
    """Just: with a little more work the other one would be first."""
    close = waiting(1.0)
    assert drain(queue_of((close, 0.99), (waiting(2.0), 0.1)), NOW)[0] is close
    close = waiting(1.0)
    assert drain(queue_of((close, 1.01), (waiting(2.0), 0.1)), NOW)[-1] is close


def test_what_is_late_makes_way_once_and_not_for_ever() -> None:
    late, kept = waiting(1.0), waiting(5.0, NOW + 3)
    queue = queue_of((late, 0.5), (kept, 0.5))
    assert queue.first(NOW + 3) is kept
    for later in range(4, 30):  # a flood of prompts that can be in time
        queue.push(waiting(5.0, NOW + later), 0.5)
        if queue.first(NOW + later) is late:
            break
        queue.remove((queue.first(NOW + later) or kept).key)
    assert later <= AGEING_S + 2


def test_without_an_objective_a_prompt_is_overtaken_for_a_bounded_time() -> None:
    patient = waiting()
    queue = queue_of((patient, 1.0))
    for later in range(1, 30):
        queue.push(waiting(0.5, NOW + later), 0.1)
        first = queue.first(NOW + later)
        if first is patient:
            break
        queue.remove((first or patient).key)
    assert later <= AGEING_S


def test_priority_is_worth_time() -> None:
    low, high = waiting(1.0), waiting(1.0 + 2 * PRIORITY_S, priority=3)
    assert drain(queue_of((low, 0.0), (high, 0.0)), NOW) == [high, low]
