"""An engine without a model, whose KV says what it is.

The bytes of a position are a function of its token and its place. Every step reads all KV of its sequences back and
compares it byte by byte, so a decode worker proves that it reads what a prefill worker wrote. The next token is a
function of the whole KV that was read: `continuation` says what must come out.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from collections.abc import Sequence as Tokens

import numpy as np
import numpy.typing as npt

from baton.engine.api import Sampled, Sequence, Work
from baton.model import KvLayout
from baton.spec import TokenLogprobs
from kvtransfer.blocks.memory import PoolMemory

LAYOUT = KvLayout(layers=2, kv_heads=1, head_dim=4, dtype="float32")
VOCABULARY = 1000
GENEROUS = 20.0
Kv = npt.NDArray[np.uint32]


def kv_of(tokens: Tokens[int], layout: KvLayout = LAYOUT) -> Kv:
    """[token][layer][key|value][head][dim]."""
    ids = np.asarray(tokens, dtype=np.uint32)
    shape = (layout.layers, 2, layout.kv_heads, layout.head_dim)
    parts = np.arange(np.prod(shape), dtype=np.uint32).reshape(shape)
    seeds = ids * np.uint32(2654435761) + np.arange(len(ids), dtype=np.uint32) * np.uint32(40503) + np.uint32(1)
    return seeds.reshape(-1, 1, 1, 1, 1) + parts * np.uint32(97)


def draw(kv: Kv) -> int:
    """The token that this KV leads to."""
    weights = np.arange(1, len(kv) + 1, dtype=np.uint64).reshape(-1, 1, 1, 1, 1)
    return int((kv * weights).sum() % 2**61) % VOCABULARY


def continuation(tokens: Tokens[int], count: int) -> list[int]:
    """The `count` tokens that follow."""
    known = list(tokens)
    for _ in range(count):
        known.append(draw(kv_of(known)))
    return known[len(tokens) :]


class CountingEngine:
    """Implements `Engine`. `gate` stops it before a step; `fail` makes the next step raise. `before_step` is called
    with the number of steps so far, on the engine's thread. Attempts in `poisoned` draw nothing but an error."""

    def __init__(self, memory: PoolMemory) -> None:
        self.layout = memory.layout
        self.gate = threading.Event()
        self.gate.set()
        self.waiting = threading.Event()
        self.fail: Exception | None = None
        self.poisoned: set[bytes] = set()
        self.before_step: Callable[[int], None] | None = None
        self.batches: list[list[tuple[bytes, int]]] = []
        self.corrupt: list[str] = []
        self.woken: list[tuple[int, ...]] = []
        shape = (memory.blocks, *memory.layout.shape)
        self._pool: Kv = np.frombuffer(memory.buffer, dtype=np.uint32).reshape(shape)

    def step(self, batch: list[Work]) -> list[Sampled | None]:
        if self.before_step is not None:
            self.before_step(len(self.batches))
        self.batches.append([(work.sequence.key, work.count) for work in batch])
        self.waiting.set()
        assert self.gate.wait(GENEROUS), "the gate was not opened"
        self.waiting.clear()
        failure, self.fail = self.fail, None
        if failure is not None:
            raise failure
        return [self._compute(work) for work in batch]

    def warm_up(self) -> None:
        """Nothing is slow."""

    def wake(self, blocks: Tokens[int]) -> None:
        """Notes the blocks; this engine never sleeps."""
        self.woken.append(tuple(blocks))

    def close(self) -> None:
        """Lets go of the pool's memory."""
        del self._pool

    def _compute(self, work: Work) -> Sampled | None:
        sequence, samples = work.sequence, work.samples
        end = sequence.computed + work.count
        expected = kv_of(sequence.tokens[:end], self.layout)
        for position in range(sequence.computed, end):
            self._at(sequence, position)[...] = expected[position]
        sequence.computed = end
        found = np.stack([self._at(sequence, position) for position in range(end)])
        if not np.array_equal(found, expected):
            wrong = [i for i in range(end) if not np.array_equal(found[i], expected[i])]
            self.corrupt.append(f"{sequence.key.hex()[:8]}: positions {wrong[:8]} of {end}")
            raise AssertionError(self.corrupt[-1])
        if not samples:
            return None
        if sequence.key in self.poisoned:
            return Sampled((), error=f"logits are not finite at position {end}")
        logprobs = () if sequence.sampling.logprobs is None else (TokenLogprobs(-0.5, ((7, -1.5),)),)
        return Sampled((draw(found),), logprobs)

    def _at(self, sequence: Sequence, position: int) -> Kv:
        """[layer][key|value][head][dim] of one position."""
        block, slot = divmod(position, self.layout.block_tokens)
        view: Kv = self._pool[sequence.blocks[block], :, :, :, slot, :]
        return view
