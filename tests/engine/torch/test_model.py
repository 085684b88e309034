"""Logits against `transformers` in float32, however a sequence is cut into steps and whatever shares its steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from baton.engine.api import Sequence, Work
from baton.engine.stepper import Stepper
from baton.engine.torch.engine import TorchEngine
from baton.spec import Sampling
from tests.engine.conftest import VARIANTS, Computing, Tiny, make_tiny, tokens_for


def sequence(tokens: list[int], blocks: list[int], computed: int = 0) -> Sequence:
    return Sequence(bytes(16), list(tokens), len(tokens), blocks, computed, Sampling(temperature=0.0))


def last_logits(engine: Stepper, whole: Sequence, counts: list[int]) -> list[np.ndarray]:
    """Computes a sequence in pieces of `counts` tokens, each piece as if it were all that is known."""
    known, rows = whole.tokens, []
    for count in counts:
        whole.tokens = known[: whole.computed + count]
        rows.append(engine.logits([Work(whole, count)])[0])
    return rows


def assert_close(found: list[np.ndarray], reference: torch.Tensor, ends: list[int]) -> None:
    for row, end in zip(found, ends, strict=True):
        np.testing.assert_allclose(row, reference[end - 1].numpy(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "counts",
    [[150], [1] * 20, [37, 1, 1, 50, 16, 1, 44], [16, 16, 33, 85], [2, 147, 1]],
    ids=["whole", "decode", "mixed", "chunks", "odd"],
)
def test_matches_the_reference_however_it_is_cut(
    computing: Computing, tiny: Callable[[str], Tiny], variant: str, counts: list[int]
) -> None:
    model = tiny(variant)
    engine, tokens = computing.engine(model), tokens_for(sum(counts))
    table = torch.randperm(engine.pool.count, generator=torch.Generator().manual_seed(3)).tolist()
    found = last_logits(engine, sequence(tokens, table[:10]), counts)
    computing.assert_near(found, model.logits(tokens), np.cumsum(counts).tolist())


@pytest.mark.parametrize("variant", ["llama", "qwen3"])
def test_a_mixed_batch_computes_each_sequence_as_if_alone(
    computing: Computing, tiny: Callable[[str], Tiny], variant: str
) -> None:
    model = tiny(variant)
    engine = computing.engine(model)
    lengths = [(40, 1), (0, 30), (41, 1), (25, 60), (0, 1), (7, 1), (90, 1), (16, 2)]
    batch, free = [], iter(range(engine.pool.count))
    for index, (prefix, count) in enumerate(lengths):
        tokens = tokens_for(prefix + count, seed=index)
        one = sequence(tokens, [next(free) for _ in range(engine.layout.blocks_for(len(tokens)))])
        if prefix:
            last_logits(engine, one, [prefix])
            one.tokens = tokens
        batch.append(Work(one, count))
    found = engine.logits(batch)
    for index, work in enumerate(batch):
        assert work.sequence.remaining == 0
        tokens = work.sequence.tokens
        computing.assert_near([found[index]], model.logits(tokens), [len(tokens)])


def test_a_prefix_cached_by_another_sequence_serves(computing: Computing, tiny: Callable[[str], Tiny]) -> None:
    model = tiny("llama")
    engine = computing.engine(model)
    shared, first, second = tokens_for(48), tokens_for(20, seed=1), tokens_for(33, seed=2)
    last_logits(engine, sequence(shared + first, [5, 3, 8, 1, 0]), [68])
    tail = sequence(shared + second, [5, 3, 8, 20, 21, 22], computed=48)
    found = engine.logits([Work(tail, 33)])[0]
    computing.assert_near([found], model.logits(shared + second), [81])


def test_long_chunks_over_a_prefix_are_tiled(computing: Computing, tiny: Callable[[str], Tiny]) -> None:
    model = tiny("llama")
    engine, tokens = computing.engine(model), tokens_for(500)
    found = last_logits(engine, sequence(tokens, list(range(32))), [100, 399, 1])
    computing.assert_near(found, model.logits(tokens), [100, 499, 500])


def test_only_what_ends_known_tokens_samples(computing: Computing, tiny: Callable[[str], Tiny]) -> None:
    engine = computing.engine(tiny("llama"))
    chunk, whole = sequence(tokens_for(40), [0, 1, 2]), sequence(tokens_for(9), [3])
    results = engine.step([Work(chunk, 17), Work(whole, 9)])
    assert results[0] is None
    assert results[1] is not None
    assert (chunk.computed, whole.computed) == (17, 9)
    assert (len(chunk.tokens), len(whole.tokens)) == (40, 9)
    assert engine.step([Work(chunk, 5)]) == [None]


def test_sharded_folders_load(computing: Computing, tmp_path: Path) -> None:
    model = make_tiny(tmp_path, "llama", shard="100KB")
    assert len(model.describe().model.weight_files()) > 1
    tokens = tokens_for(30)
    found = last_logits(computing.engine(model), sequence(tokens, [0, 1]), [30])
    computing.assert_near(found, model.logits(tokens), [30])


@pytest.mark.parametrize(("dtype", "least"), [("bfloat16", 0.995), ("float16", 0.9999)])
def test_narrow_dtypes_stay_near_the_reference(tiny: Callable[[str], Tiny], dtype: str, least: float) -> None:
    """Random weights suffer from being rounded themselves; what a trained model loses is the quality tests' matter."""
    model = tiny("llama")
    tokens = tokens_for(60)
    found = last_logits(model.engine(dtype), sequence(tokens, [3, 2, 1, 0]), [20, 39, 1])
    for row, end in zip(found, [20, 59, 60], strict=True):
        expected = model.logits(tokens)[end - 1].numpy()
        assert np.corrcoef(row, expected)[0, 1] > least


def test_the_embedded_model_matches_the_reference(embedded_reference: Any, embedded_engine: TorchEngine) -> None:
    tokens = [1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018, 411, 407, 19712, 8182]
    with torch.inference_mode():
        expected = embedded_reference(torch.tensor([tokens])).logits[0]
    found = last_logits(embedded_engine, sequence(tokens, [9, 4]), [12, 6, 1])
    assert_close(found, expected, [12, 18, 19])
