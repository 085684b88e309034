"""An engine that simulates: steps take a cost model's time, tokens are random, KV is a watermark.

The process, its streams, the pool and the transfers around it are real. A position's KV encodes its token and
position, so that a worker can check that it reads the KV that another one wrote. Imports no torch: a worker starts at
once.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Sequence as Seq
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from baton.config import WorkerConfig
from baton.cost import COEFFICIENTS, StepCost, StepShape, pairs
from baton.engine.api import Sampled, Sequence, Work, shape_of
from baton.engine.files.card import LocalCard, describe, sha256
from baton.engine.files.models import resolve
from baton.engine.sampling import stream_key
from baton.errors import ConfigError
from baton.model import DTYPE_BYTES, KvLayout
from baton.spec import TokenLogprobs

BYTES_MODEL = "bytes"
"""The name of a tokeniser without a model or a file: each byte is a token."""
BYTES_CONTEXT = 131_072
PREFIX = "simulated/"
"""Prefix of a simulated model's name, to tell it from the real model."""
_END = "<|end|>"
COSTS = {
    # The embedded model with the native kernels on one AMD EPYC (Zen 4) core, 23 November 2026: proportions from
    # `make cost-model` on a busy machine, scaled to the 1.03 s that 1,000 tokens take on a quiet one.
    "smollm2-135m": StepCost(4.6e-3, 7.9e-4, 4.6e-7, 3.5e-3, 8.2e-4, 2.5e-6),
    # To load everything around the model: 1 ms a step.
    "instant": StepCost(chunk=1e-3, step=1e-3),
}
Bytes = npt.NDArray[np.uint8]


def simulated_card(config: WorkerConfig) -> LocalCard:
    """The model's card with another name and fingerprint, so that it pairs with no worker that computes."""
    if config.model == BYTES_MODEL:
        real = bytes_card()
    else:
        real = describe(resolve(config.model), config.dtype, "cpu", config.kv_dtype).card
    layout = real.kv_layout
    if config.sim_kv_bytes_per_token:
        layout = KvLayout(layers=1, kv_heads=1, head_dim=config.sim_kv_bytes_per_token // 4, dtype="bfloat16")
    parts = json.dumps({"simulated": real.fingerprint, "layout": asdict(layout)}, sort_keys=True)
    fingerprint = hashlib.sha256(parts.encode()).hexdigest()
    return replace(real, name=PREFIX + real.name, fingerprint=fingerprint, kv_layout=layout, simulated=True)


def simulated_engine(config: WorkerConfig, card: LocalCard, buffer: memoryview) -> SimulatedEngine:
    """Raises ConfigError for a cost model that can't be read."""
    return SimulatedEngine(
        card,
        buffer,
        faster(read_costs(config.cost_model), config.sim_speed),
        config.sim_eos_after,
        config.sim_eos_spread,
    )


def read_costs(name: str) -> StepCost:
    """Costs by a name of `COSTS` or from a JSON file with all COEFFICIENTS. Raises ConfigError with file and field."""
    if name in COSTS:
        return COSTS[name]
    try:
        given = json.loads(Path(name).expanduser().read_text())
        found = {field: float(given[field]) for field in COEFFICIENTS}
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ConfigError(f"cost_model: {name!r} is neither {' nor '.join(COSTS)} nor a file: {reason}") from None
    except (KeyError, TypeError, ValueError) as error:
        reason = f"{error.args[0]} is missing" if isinstance(error, KeyError) else str(error)
        raise ConfigError(f"cost_model: {name}: expected an object of {', '.join(COEFFICIENTS)}: {reason}") from None
    for field, value in found.items():
        if not math.isfinite(value) or value < 0:
            raise ConfigError(f"cost_model: {name}: {field} must be 0 or more seconds, not {value}")
    return StepCost(**found)


def faster(costs: StepCost, factor: float) -> StepCost:
    """The same machine, `factor` times as fast."""
    return replace(costs, **{name: getattr(costs, name) / factor for name in COEFFICIENTS})


def typical_steps(costs: StepCost) -> tuple[tuple[StepShape, float], ...]:
    """The steps of a self-measurement, by the cost model instead of a clock."""
    chunks = [StepShape(new, pairs(new, cached)) for new in (16, 128) for cached in (0, 1024)]
    steps = [StepShape(0, 0.0, count, count * tokens) for count in (1, 8) for tokens in (32, 256)]
    return tuple((shape, costs.seconds(shape)) for shape in (*chunks, *steps))


@cache
def bytes_card() -> LocalCard:
    """A card with a tokeniser of 256 bytes and one special token, the end of a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({character: index for index, character in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(_END, special=True)])
    text = made.to_str()
    template = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
    return LocalCard(
        name=BYTES_MODEL,
        fingerprint=hashlib.sha256(text.encode()).hexdigest(),
        context_tokens=BYTES_CONTEXT,
        vocabulary_size=made.get_vocab_size(),
        eos_token_ids=(len(alphabet),),
        eos_token=_END,
        tokenizer_json=text.encode(),
        chat_template=template,
        kv_layout=KvLayout(layers=1, kv_heads=1, head_dim=16, dtype="bfloat16"),
        tokenizer_sha256=sha256(text.encode()),
        chat_template_sha256=sha256(template.encode()),
    )


class SimulatedEngine:
    """Implements `baton.engine.api.Engine`; a step blocks its thread with the interpreter's lock released.

    The next token is a pure function of the seed and the number of tokens so far. An end-of-sequence token comes only
    as the `eos_after`-th of the output, or up to `eos_spread` earlier or later by the seed; with 0, never. A sequence
    whose blocks hold other KV than its own raises AssertionError: the step fails, and its sequences with it.
    """

    def __init__(
        self, card: LocalCard, buffer: memoryview, costs: StepCost, eos_after: int = 0, eos_spread: int = 0
    ) -> None:
        self.costs, self.layout = costs, card.kv_layout
        self._card, self._eos_after, self._eos_spread = card, eos_after, eos_spread
        self._eos = sorted(card.eos_token_ids)
        self._kv = _shares(buffer, card.kv_layout)

    def warm_up(self) -> None:
        """Does nothing."""

    def wake(self, blocks: Seq[int]) -> None:
        """Does nothing."""

    def step(self, batch: list[Work]) -> list[Sampled | None]:
        """Returns no earlier than after the cost model's time."""
        due = time.monotonic() + self.costs.seconds(shape_of(batch))
        sampled = [self._advance(work) for work in batch]
        if (left := due - time.monotonic()) > 0:
            time.sleep(left)
        return sampled

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
        """Checks the KV that another worker computed, at the first step here."""
        if sequence.computed == 0:
            return
        size = self.layout.block_tokens
        blocks = sequence.blocks[: self.layout.blocks_for(sequence.computed)]
        # The first and the last share show a block that came in part.
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
        if self._eos_after and self._eos and output == self._length(seed):
            return self._eos[0]
        token = stream_key(seed, position) % (self._card.vocabulary_size - len(self._eos))
        for eos in self._eos:
            token += token >= eos
        return token

    def _length(self, seed: int) -> int:
        """Of an output, in tokens; uniform over its range."""
        return self._eos_after - self._eos_spread + stream_key(seed, 0) % (2 * self._eos_spread + 1)


def _shares(buffer: memoryview, layout: KvLayout) -> Bytes:
    """The pool as [block][layer, key or value, head][token][bytes of a token], without scales."""
    flat: Bytes = np.frombuffer(buffer, dtype=np.uint8)
    blocks = len(flat) // layout.block_bytes
    shares = flat[: blocks * layout.block_bytes].reshape(blocks, -1, layout.share_bytes)
    row = layout.head_dim * DTYPE_BYTES[layout.dtype]
    return np.lib.stride_tricks.as_strided(
        shares, (*shares.shape[:2], layout.block_tokens, row), (*shares.strides[:2], row, 1)
    )


def _watermarks(tokens: list[int], start: int, end: int, size: int) -> Bytes:
    """[position][byte]: 32 bits of token and position, repeated, for positions [start, end)."""
    ids = np.array(tokens[start:end], np.uint32)
    marks = ids * np.uint32(2654435761) + np.arange(start, end, dtype=np.uint32) * np.uint32(40503) + np.uint32(1)
    return np.tile(marks.view(np.uint8).reshape(-1, 4), (1, -(-size // 4)))[:, :size]
