"""A short self-measurement at start, a few steps of both phases, so that the first prediction is sane."""

from __future__ import annotations

import time
from collections.abc import Iterator

from baton.cost import StepShape
from baton.engine.api import Engine, Sequence, Work, shape_of
from baton.spec import Sampling

LIMIT_S = 1.5
"""After this time the measurement ends, with the steps that it has."""
CHUNKS = ((16, 0), (128, 0), (64, 1024), (128, 0))
"""(new tokens, tokens that count as computed before them)."""
STEPS = ((1, 32), (8, 32), (4, 256), (1, 32), (8, 128))
"""(sequences, tokens of each)."""


def measure(engine: Engine, blocks: int, context_tokens: int) -> list[tuple[StepShape, float]]:
    """Steps with their seconds, over a pool of `blocks` blocks that no sequence holds yet."""
    found: list[tuple[StepShape, float]] = []
    started = time.monotonic()
    for batch in _batches(engine, blocks, min(blocks * engine.layout.block_tokens, context_tokens)):
        shape, begun = shape_of(batch), time.monotonic()
        engine.step(batch)
        found.append((shape, time.monotonic() - begun))
        if time.monotonic() - started > LIMIT_S:
            break
    return found


def _batches(engine: Engine, blocks: int, room: int) -> Iterator[list[Work]]:
    """Alternates chunks and steps, so that the time limit leaves some of both. `room` tokens fit pool and context."""
    for chunk, step in zip((*CHUNKS, None), STEPS, strict=True):
        if chunk is not None:
            new = min(chunk[0], room)
            cached = min(chunk[1], room - new)
            yield [Work(_sequence(engine, cached + new, cached, 0), new)]
        count, tokens = min(step[0], blocks), min(step[1], room)
        held = min(engine.layout.blocks_for(tokens), blocks // count)  # no two sequences write one block
        tokens = min(tokens, held * engine.layout.block_tokens)
        if tokens >= 2:
            yield [Work(_sequence(engine, tokens, tokens - 1, index * held), 1) for index in range(count)]


def _sequence(engine: Engine, tokens: int, computed: int, first_block: int) -> Sequence:
    blocks = list(range(first_block, first_block + engine.layout.blocks_for(tokens)))
    return Sequence(bytes(16), [0] * tokens, tokens, blocks, computed, Sampling(temperature=0.0))
