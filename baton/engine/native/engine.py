"""The engine over the compiled kernels: one call per step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from baton.config import WeightChoice
from baton.engine.api import Work
from baton.engine.files.card import ModelDescription
from baton.engine.files.tensors import open_tensors
from baton.engine.kv import Buffer, KvPool, make_pool
from baton.engine.native.build import NativeUnavailable, arithmetic_of
from baton.engine.native.library import KV_FORMATS, SPAN, Library, NativeModel, load
from baton.engine.native.weights import load_model
from baton.engine.sampling import Logits
from baton.engine.stepper import Stepper, state_of

BLOCK_TOKENS, MAX_HEAD_DIM = 16, 512
"""The block size of the kernels, and their largest head."""


class NativeEngine(Stepper):
    """Weights in bf16 or in groups of 8 or 4 bits, KV in bf16 or 8 bits, on one thread of the CPU.

    Each logit is one fixed order of operations over its own sequence: with one set of weights, its bits depend neither
    on the batch nor on how the sequence was cut into steps. `model` has the weights, in the library's memory.
    """

    def __init__(self, description: ModelDescription, model: NativeModel, pool: KvPool) -> None:
        super().__init__(description, pool, f"native {model.library.target.name}", model.weight_bytes)
        self.model = model
        self._logits = np.empty((0, description.config.vocabulary), np.float32)

    @classmethod
    def load(
        cls,
        description: ModelDescription,
        *,
        buffer: Buffer | None = None,
        blocks: int | None = None,
        weights: WeightChoice = "auto",
        library: Library | None = None,
    ) -> NativeEngine:
        """The pool is as for `TorchEngine.load`; `library` defaults to the processor's own. Raises NativeUnavailable if
        the kernels can't be compiled or can't serve the layout, ModelFileError for damaged files."""
        layout, config = description.card.kv_layout, description.config
        if layout.dtype not in KV_FORMATS:
            raise NativeUnavailable(f"the kernels keep KV in {' or '.join(KV_FORMATS)}, not {layout.dtype}")
        if layout.block_tokens != BLOCK_TOKENS or config.head_dim > MAX_HEAD_DIM:
            raise NativeUnavailable(f"blocks of {layout.block_tokens} tokens with heads of {config.head_dim}")
        library = library or load()
        source = open_tensors(description.model, config)
        model = load_model(library, source, config, layout.dtype, weights, description.card.tokenizer_json)
        return cls(description, model, make_pool(layout, buffer, blocks))

    def wake(self, blocks: Sequence[int]) -> None:
        self.model.touch(self.pool.blocks.data_ptr(), np.array(blocks, np.int64), self.layout.block_bytes)

    @property
    def arithmetic(self) -> dict[str, str]:
        """The facts that a logit's bits depend on, beside the model's file and the formats of weights and KV. Packed
        weights are among them: calibration sums in an order that torch chooses."""
        return arithmetic_of(self.model.library.target) | {"packed": f"{self.model.checksum():016x}"}

    def _forward(self, batch: list[Work]) -> tuple[tuple[int, ...], Logits]:
        tokens: list[int] = []
        spans, sampled, rows = [], [], []
        for index, work in enumerate(batch):
            sequence = work.sequence
            first = sequence.computed
            spans.append((len(tokens), work.count, first, 0, state_of(sequence).table.data_ptr()))
            tokens += sequence.tokens[first : first + work.count]
            if work.samples:
                sampled.append(index)
                rows.append(len(tokens) - 1)
        if len(rows) > len(self._logits):
            self._logits = np.empty((len(rows), self._logits.shape[1]), np.float32)
        pool, ids = self.pool.blocks.data_ptr(), np.array(tokens, np.int32)
        self.model.step(pool, ids, np.array(spans, SPAN), np.array(rows, np.int32), self._logits)
        return tuple(sampled), self._logits
