"""The engine's benchmark cases: the steps of a prefill worker and of a decode worker, over random tokens."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass

from baton.engine.api import Sequence, Work
from baton.engine.native.engine import NativeEngine
from baton.engine.stepper import Stepper
from baton.spec import Sampling

GREEDY = Sampling(temperature=0.0)
CHUNK = 512


@dataclass(frozen=True, slots=True)
class Case:
    """A prompt of `tokens` computed in chunks, or one step of `sequences` that have `tokens` each."""

    name: str
    tokens: int
    sequences: int = 0

    @property
    def is_prefill(self) -> bool:
        return self.sequences == 0

    def rate(self, seconds: float) -> float:
        """Tokens per second of a run."""
        return (self.tokens if self.is_prefill else self.sequences) / seconds


CASES = (
    Case("prefill 1024", 1024),
    Case("prefill 4096", 4096),
    Case("decode 1", 100, 1),
    Case("decode 16, short", 100, 16),
    Case("decode 16, 1000 tokens", 1000, 16),
)
BLOCKS = 1100
"""Enough for each case: 16 sequences of 1,000 tokens are 1,024 blocks."""


def run(engine: Stepper, case: Case, steps: int = 8) -> list[float]:
    """Seconds of the whole prompt, or of each of `steps` decode steps after an uncounted first one."""
    return [_prefill(engine, case)] if case.is_prefill else _decode(engine, case, steps)[1:]


def _sequence(engine: Stepper, tokens: int, room: int, first_block: int, computed: int, seed: int) -> Sequence:
    rng = random.Random(seed)
    known = [rng.randrange(engine.description.config.vocabulary) for _ in range(tokens)]
    blocks = list(range(first_block, first_block + engine.layout.blocks_for(room)))
    return Sequence(bytes(16), known, tokens, blocks, computed, GREEDY)


def _prefill(engine: Stepper, case: Case) -> float:
    sequence = _sequence(engine, case.tokens, case.tokens, 0, 0, 0)
    started = time.perf_counter()
    while sequence.remaining:
        engine.step([Work(sequence, min(CHUNK, sequence.remaining))])
    return time.perf_counter() - started


def _decode(engine: Stepper, case: Case, steps: int) -> list[float]:
    room = case.tokens + steps + 1
    held = engine.layout.blocks_for(room)
    running = [
        _sequence(engine, case.tokens, room, index * held, case.tokens - 1, index) for index in range(case.sequences)
    ]
    seconds = []
    for _ in range(steps + 1):
        started = time.perf_counter()
        results = engine.step([Work(sequence, 1) for sequence in running])
        seconds.append(time.perf_counter() - started)
        for sequence, result in zip(running, results, strict=True):
            assert result is not None, "a decode step samples"
            sequence.tokens.append(result.token_ids[0])
    return seconds


def parts(engine: NativeEngine, case: Case) -> dict[str, float]:
    """Seconds of each part of one run, by the kernels' timers."""
    engine.model.profile(True)
    run(engine, case)
    return engine.model.profile(False)
