"""Every resident, in every step."""

from __future__ import annotations

from baton.engine.api import Sequence
from decode_worker.scheduler import DecodeScheduler
from tests.prefill_worker.builders import sequence


def resident(prompt: int) -> Sequence:
    made = sequence(prompt, computed=prompt)
    made.tokens.append(7)
    return made


def test_all_residents_one_token_each() -> None:
    scheduler = DecodeScheduler()
    assert scheduler.pick() == []
    sequences = [resident(5), resident(50)]
    for each in sequences:
        scheduler.add(each)
    batch = scheduler.pick()
    assert [(work.sequence, work.count, work.samples) for work in batch] == [(each, 1, True) for each in sequences]


def test_joins_and_leaves_between_steps() -> None:
    scheduler = DecodeScheduler()
    first, second = resident(5), resident(6)
    scheduler.add(first)
    scheduler.add(second)
    scheduler.remove(first.key)
    scheduler.remove(first.key)
    assert [work.sequence for work in scheduler.pick()] == [second]
