"""The engine of a worker that simulates: steps take a cost model's time, tokens are random, KV is a watermark.

Everything around it is real: the process, its streams, the pool, the transfers. So is the check that what a worker
reads is what another one wrote: each position's KV says which token it belongs to and where.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence as Seq

import numpy as np
import numpy.typing as npt

from baton.cost import StepCost
from baton.engine.api import Sampled, Sequence, Work, shape_of
from baton.engine.files.card import ModelCard
from baton.spec import TokenLogprobs
from kvtransfer.blocks.layout import DTYPE_BYTES, KvLayout

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
Bytes = npt.NDArray[np.uint8]


class SimulatedEngine:
    """Implements `baton.engine.api.Engine`. Used from one thread, which it blocks with the interpreter's lock released.

    The next token is a pure function of the seed and the number of tokens so far. An end-of-sequence token comes only
    as the `eos_after`-th of the output, and never where that is 0. KV in the pool that is not of the sequence that
    reads it is an AssertionError: the step fails, and its sequences with it.
    """

    def __init__(self, card: ModelCard, buffer: memoryview, costs: StepCost, eos_after: int = 0) -> None:
        self.costs = costs
        self._card, self._eos_after = card, eos_after
        self._eos = sorted(card.eos_token_ids)
        self._kv = _shares(buffer, card.kv_layout)

    @property
    def layout(self) -> KvLayout:
        return self._card.kv_layout

    def warm_up(self) -> None:
        """Nothing is slow only once."""

    def wake(self, blocks: Seq[int]) -> None:
        """Nothing is slow after a rest."""

    def step(self, batch: list[Work]) -> list[Sampled | None]:
        """See `Engine.step`. Returns no earlier than the cost model says."""
        due = time.monotonic() + self.costs.seconds(shape_of(batch))
        sampled = [self._advance(work) for work in batch]
        if (left := due - time.monotonic()) > 0:
            time.sleep(left)
        return sampled

    def close(self) -> None:
        """Lets go of the pool's memory."""
        del self._kv

    def _advance(self, work: Work) -> Sampled | None:
        sequence, samples = work.sequence, work.samples
        if sequence.engine_state is None:
            sequence.engine_state = True
            self._verify(sequence)
        end = sequence.computed + work.count
        self._write(sequence, sequence.computed, end)
        sequence.computed = end
        return self._draw(sequence) if samples else None

    def _write(self, sequence: Sequence, start: int, end: int) -> None:
        rows = _watermarks(sequence.tokens, start, end, self._kv.shape[-1])
        size = self.layout.block_tokens
        while start < end:
            slot = start % size
            count = min(size - slot, end - start)
            self._kv[sequence.blocks[start // size], :, slot : slot + count] = rows[:count]
            rows, start = rows[count:], start + count

    def _verify(self, sequence: Sequence) -> None:
        """What somebody else computed, at the first step here."""
        if sequence.computed == 0:
            return
        size = self.layout.block_tokens
        blocks = sequence.blocks[: self.layout.blocks_for(sequence.computed)]
        # The first and the last share: a block that came in part shows.
        for share in (0, -1):
            found = self._kv[blocks, share].reshape(len(blocks) * size, -1)[: sequence.computed]
            wrong = np.any(found != _watermarks(sequence.tokens, 0, sequence.computed, found.shape[1]), axis=1)
            assert not wrong.any(), f"the KV of position {int(wrong.argmax())} is not this sequence's"

    def _draw(self, sequence: Sequence) -> Sampled:
        position = len(sequence.tokens)
        token = self._token(sequence.sampling.seed, position, sequence.output_tokens + 1)
        if (count := sequence.sampling.logprobs) is None:
            return Sampled((token,))
        vocabulary = self._card.vocabulary_size
        flat = -math.log(vocabulary)
        others = tuple(((token + index) % vocabulary, flat) for index in range(count))
        return Sampled((token,), (TokenLogprobs(flat, others),))

    def _token(self, seed: int, position: int, output: int) -> int:
        """Uniform over the vocabulary without its end-of-sequence tokens."""
        if self._eos_after and output == self._eos_after and self._eos:
            return self._eos[0]
        token = _mix(_mix(seed) + (position + 1) * _GOLDEN) % (self._card.vocabulary_size - len(self._eos))
        for eos in self._eos:
            token += token >= eos
        return token


def _shares(buffer: memoryview, layout: KvLayout) -> Bytes:
    """The pool as [block][layer, key or value, head][token][bytes of a token]; scales, where there are, left out."""
    flat: Bytes = np.frombuffer(buffer, dtype=np.uint8)
    blocks = len(flat) // layout.block_bytes
    shares = flat[: blocks * layout.block_bytes].reshape(blocks, -1, layout.share_bytes)
    row = layout.head_dim * DTYPE_BYTES[layout.dtype]
    return np.lib.stride_tricks.as_strided(
        shares, (*shares.shape[:2], layout.block_tokens, row), (*shares.strides[:2], row, 1)
    )


def _watermarks(tokens: list[int], start: int, end: int, size: int) -> Bytes:
    """[position][byte]: 32 bits of token and position, over and over, for positions [start, end)."""
    ids = np.array(tokens[start:end], np.uint32)
    marks = ids * np.uint32(2654435761) + np.arange(start, end, dtype=np.uint32) * np.uint32(40503) + np.uint32(1)
    return np.tile(marks.view(np.uint8).reshape(-1, 4), (1, -(-size // 4)))[:, :size]


def _mix(value: int) -> int:
    """SplitMix64's finaliser (Steele, Lea and Flood, OOPSLA 2014)."""
    value &= _MASK
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & _MASK
    return value ^ (value >> 31)
