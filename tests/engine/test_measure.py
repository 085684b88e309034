"""The self-measurement at start stays within the pool and the context, and gives a cost of both phases."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import pytest

from baton.cost import CostModel
from baton.engine.api import Sampled, Work
from baton.engine.measure import measure
from baton.model import KvLayout


class Watching:
    """An engine that only looks at what it is asked for."""

    layout = KvLayout(layers=1, kv_heads=1, head_dim=8, dtype="float32")

    def __init__(self, blocks: int, context: int) -> None:
        self.blocks, self.context = blocks, context
        self.steps = 0

    def step(self, batch: list[Work]) -> list[Sampled | None]:
        self.steps += 1
        held = [block for work in batch for block in work.sequence.blocks]
        assert len(set(held)) == len(held), "no two sequences share a block"
        assert all(0 <= block < self.blocks for block in held)
        for work in batch:
            sequence = work.sequence
            assert 1 <= work.count <= sequence.remaining
            assert sequence.computed + work.count <= min(len(sequence.blocks) * self.layout.block_tokens, self.context)
        return [None] * len(batch)

    def warm_up(self) -> None:
        """Nothing is slow."""

    def wake(self, blocks: Seq[int]) -> None:
        """Nothing sleeps."""


@pytest.mark.parametrize("blocks", [1, 2, 4, 5, 8, 9, 63, 64, 65, 4096])
@pytest.mark.parametrize("context", [1, 2, 16, 100, 8192])
def test_it_stays_within_pool_and_context(blocks: int, context: int) -> None:
    engine = Watching(blocks, context)
    measured = measure(engine, blocks, context)
    assert len(measured) == engine.steps
    cost = CostModel(measured).cost
    assert cost.knows_prefill or context < 2
    assert cost.knows_decode or min(context, blocks * 16) < 2
