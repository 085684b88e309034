"""The compiled kernels: near the reference in every format, and the same bits however a sequence is computed."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize
from structlog.testing import capture_logs

from baton.config import WeightChoice
from baton.engine.api import Sequence, Work
from baton.engine.card import describe
from baton.engine.load import load_engine
from baton.engine.models import ResolvedModel, resolve
from baton.engine.native import build, library
from baton.engine.native.build import NativeUnavailable
from baton.engine.native.engine import NativeEngine
from baton.engine.offline import Prompt, generate
from baton.engine.torch_engine import TorchEngine
from baton.errors import ConfigError
from baton.spec import Sampling
from tests.engine.conftest import VARIANTS, Tiny, make_tiny, tokens_for
from tests.engine.test_files import write_gguf
from tests.engine.test_model import last_logits, sequence

Logits = np.ndarray

CASES = 200
"""Random cases of the determinism test."""
TIMES_BF16 = {"bf16": 1.0, "int8": 4.0, "int4": 20.0}
"""How far from float32 each format may be, in terms of torch's own bf16. The tiny models' random weights suffer from
rounding far more than trained ones do: what a format costs those is the embedded model's test."""


@pytest.fixture(scope="session")
def kernels() -> library.Library:
    """The kernels of this machine, from the user's own cache: tests do not compile them each time."""
    try:
        return library.load()
    except NativeUnavailable as error:
        pytest.skip(str(error))


def native(
    tiny: Tiny, weights: WeightChoice = "bf16", kv_dtype: str = "auto", blocks: int = 64,
    of: library.Library | None = None,
) -> NativeEngine:  # fmt: skip
    description = describe(resolve(str(tiny.folder)), "bfloat16", kv_dtype=kv_dtype)
    return NativeEngine.load(description, blocks=blocks, weights=weights, library=of)


def error_of(found: list[Logits], reference: torch.Tensor, ends: list[int]) -> float:
    """Root mean square of the difference over the standard deviation of the reference."""
    expected = reference[[end - 1 for end in ends]].numpy()
    return float(np.sqrt(np.mean((np.stack(found) - expected) ** 2)) / expected.std())


CUTS = {"whole": [150], "decode": [1] * 20, "mixed": [37, 1, 1, 50, 16, 1, 44], "chunks": [16, 48, 33, 1, 52]}


def bound(model: Tiny, tokens: list[int]) -> float:
    """The error of torch's bf16, over positions enough to be no accident."""
    engine = model.engine("bfloat16")
    counts = [16] * (len(tokens) // 16)
    found = last_logits(engine, sequence(tokens, list(range(32))), counts)
    return error_of(found, model.logits(tokens), np.cumsum(counts).tolist())


@pytest.mark.parametrize("variant", VARIANTS)
def test_nearer_the_reference_than_torch_however_it_is_cut(
    kernels: library.Library, tiny: Callable[[str], Tiny], variant: str
) -> None:
    model, tokens = tiny(variant), tokens_for(160)
    engine, reference, limit = native(model), model.logits(tokens), bound(model, tokens)
    table = torch.randperm(engine.pool.count, generator=torch.Generator().manual_seed(3)).tolist()
    rows, ends = [], []
    for counts in CUTS.values():
        rows += last_logits(engine, sequence(tokens, table[:10]), counts)
        ends += np.cumsum(counts).tolist()
    assert error_of(rows, reference, ends) < limit


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("variant", ["llama", "qwen2", "qwen3"])
def test_narrow_weights_stay_near_the_reference(
    kernels: library.Library, tiny: Callable[[str], Tiny], variant: str, weights: WeightChoice
) -> None:
    model, tokens = tiny(variant), tokens_for(160)
    counts = [33, 30, 1, 26, 20, 20, 29, 1]
    found = last_logits(native(model, weights), sequence(tokens, list(range(10))), counts)
    error = error_of(found, model.logits(tokens), np.cumsum(counts).tolist())
    assert error < TIMES_BF16[weights] * bound(model, tokens)


@pytest.mark.parametrize(("kv_dtype", "times"), [("auto", 1.0), ("int8", 1.6)])
@pytest.mark.parametrize(
    ("hidden", "heads", "kv_heads", "dim"),
    [(96, 6, 2, 16), (96, 4, 4, 24), (90, 9, 3, 64), (96, 8, 1, 64), (96, 2, 1, 128), (96, 3, 3, 80)],
)
def test_shapes_of_heads(
    kernels: library.Library, tmp_path: Path, hidden: int, heads: int, kv_heads: int, dim: int,
    kv_dtype: str, times: float,
) -> None:  # fmt: skip
    shape: dict[str, Any] = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": dim}
    model = make_tiny(tmp_path, "llama", hidden_size=hidden, intermediate_size=72, **shape)
    tokens, counts = tokens_for(200), [70, 1, 50, 1, 20, 1, 56, 1]
    found = last_logits(native(model, "bf16", kv_dtype), sequence(tokens, list(range(13))), counts)
    error = error_of(found, model.logits(tokens), np.cumsum(counts).tolist())
    assert error < times * bound(model, tokens)


@pytest.mark.parametrize(
    ("weights", "kv_dtype"), [("bf16", "auto"), ("int8", "auto"), ("int4", "auto"), ("int8", "int8")]
)
def test_a_position_has_the_same_bits_in_any_batch(
    kernels: library.Library, tmp_path: Path, weights: WeightChoice, kv_dtype: str
) -> None:
    """Random batches of 1 to 64, cut anywhere, over cached prefixes, in prefill and in decode."""
    model = make_tiny(tmp_path, "llama", head_dim=64, num_attention_heads=3, num_key_value_heads=1, num_hidden_layers=2)
    engine = native(model, weights, kv_dtype, blocks=1200)
    rng = random.Random(5)
    known = [tokens_for(rng.choice((1, 15, 16, 17, 63, 64, 65, 100, 230)), seed) for seed in range(64)]
    alone = [last_logits(engine, sequence(tokens, list(range(15))), [len(tokens)])[0] for tokens in known]
    for _ in range(CASES // 4):
        chosen = rng.sample(range(64), rng.choice((1, 2, 3, 5, 7, 12, 13, 16, 31, 64)))
        free = rng.sample(range(1200), 15 * len(chosen))
        running = [sequence(known[index], free[15 * at : 15 * at + 15]) for at, index in enumerate(chosen)]
        found: dict[int, Logits] = {}
        while len(found) < len(chosen):
            ready = [at for at in range(len(chosen)) if at not in found]
            active = rng.sample(ready, rng.randint(1, len(ready)))
            works = [Work(running[at], _piece(rng, running[at].remaining)) for at in active]
            samples = {place: at for place, at in enumerate(active) if works[place].samples}
            logits = engine.logits(works)
            found |= {at: logits[place] for place, at in samples.items()}
        for at, index in enumerate(chosen):
            np.testing.assert_array_equal(found[at], alone[index])


def _piece(rng: random.Random, remaining: int) -> int:
    """The next piece of a prompt: all of it, a token (as decode computes it), or anything between."""
    return rng.choice((remaining, 1, rng.randint(1, remaining), max(1, remaining - 1)))


def test_a_prefix_of_another_sequence_serves(kernels: library.Library, tiny: Callable[[str], Tiny]) -> None:
    engine = native(tiny("llama"), "int8")
    shared, first, second = tokens_for(48), tokens_for(20, seed=1), tokens_for(33, seed=2)
    whole = last_logits(engine, sequence(shared + second, list(range(30, 36))), [81])[0]
    last_logits(engine, sequence(shared + first, [5, 3, 8, 1, 0]), [68])
    tail = sequence(shared + second, [5, 3, 8, 20, 21, 22], computed=48)
    np.testing.assert_array_equal(engine.logits([Work(tail, 33)])[0], whole)


def test_generation_is_that_of_the_reference(kernels: library.Library, tiny: Callable[[str], Tiny]) -> None:
    model = tiny("qwen3")
    (prompt,) = [Prompt(tuple(tokens_for(21)), max_tokens=8)]
    found = generate(native(model), [prompt], blocks=64)[0].tokens
    tokens = list(prompt.tokens)
    for token in found:
        logits = model.logits(tokens)[-1]
        assert logits[token] > logits.max() - 0.05 * logits.std()
        tokens.append(token)


def test_only_what_ends_known_tokens_samples(kernels: library.Library, tiny: Callable[[str], Tiny]) -> None:
    engine = native(tiny("llama"))
    chunk, whole = sequence(tokens_for(40), [0, 1, 2]), sequence(tokens_for(9), [3])
    results = engine.step([Work(chunk, 17), Work(whole, 9)])
    assert results[0] is None
    assert results[1] is not None
    assert (chunk.computed, whole.computed) == (17, 9)
    assert engine.step([Work(chunk, 5)]) == [None]


def test_blocks_beyond_a_sequence_are_not_seen(kernels: library.Library, tiny: Callable[[str], Tiny]) -> None:
    """What an earlier sequence left in a block, even what is no number, counts for nothing."""
    model, tokens = tiny("llama"), tokens_for(20)
    for counts in ([20], [1] * 20):
        clean, dirty = native(model), native(model)
        dirty.pool.blocks.fill_(float("nan"))
        found = last_logits(dirty, sequence(tokens, [7, 2]), counts)
        np.testing.assert_array_equal(found[-1], last_logits(clean, sequence(tokens, [7, 2]), counts)[-1])


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_a_files_own_grid_is_kept_exactly(
    kernels: library.Library, tiny: Callable[[str], Tiny], tmp_path: Path, kind: str
) -> None:
    quantisation = gguf.GGMLQuantizationType[kind]
    path = write_gguf(tiny("llama"), tmp_path / "m.gguf", "llama", quantisation)
    engine = NativeEngine.load(describe(resolve(str(path)), "bfloat16"), blocks=8)
    for name, slot in (("ffn_up", library.Slot.UP), ("attn_output", library.Slot.OUTPUT)):
        raw = next(t for t in gguf.GGUFReader(path).tensors if t.name == f"blk.1.{name}.weight")
        expected = dequantize(raw.data, quantisation)
        found = [engine.model.row(1, slot, row, expected.shape[1]) for row in range(len(expected))]
        np.testing.assert_array_equal(np.stack(found), expected)
    exact = TorchEngine.load(describe(resolve(str(path)), "float32"), blocks=8)
    tokens = tokens_for(50)
    pair = [last_logits(one, sequence(tokens, [0, 1, 2, 3]), [50])[0] for one in (engine, exact)]
    assert np.corrcoef(pair)[0, 1] > 0.998


@pytest.mark.parametrize(
    ("weights", "kv_dtype", "most"),
    [("bf16", "auto", 1e-3), ("auto", "auto", 5e-3), ("int8", "auto", 5e-3), ("bf16", "int8", 3e-3)],
)
def test_the_embedded_model_keeps_its_quality(
    kernels: library.Library, embedded: ResolvedModel, embedded_engine: TorchEngine,
    weights: WeightChoice, kv_dtype: str, most: float,
) -> None:  # fmt: skip
    """Mean KL divergence of the next token's distribution from float32, over a text of its own."""
    description = describe(embedded, "bfloat16", kv_dtype=kv_dtype)
    engine = NativeEngine.load(description, blocks=64, weights=weights)
    text = [1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018, 411, 407, 19712, 8182]
    (completion,) = generate(embedded_engine, [Prompt(tuple(text), max_tokens=100)], blocks=64)
    tokens, start = text + completion.tokens, len(text)
    pieces = [start] + [1] * (len(completion.tokens) - 1)
    expected = torch.tensor(np.stack(last_logits(embedded_engine, sequence(tokens[:-1], list(range(8))), pieces)))
    found = torch.tensor(np.stack(last_logits(engine, sequence(tokens[:-1], list(range(8))), pieces)))
    p, q = expected.double().log_softmax(-1), found.double().log_softmax(-1)
    assert (p.exp() * (p - q)).sum(-1).mean() < most


@pytest.mark.parametrize(
    "lacking",
    [pytest.param({"avx512f"}, marks=pytest.mark.nightly), {"avx512_vnni", "avx512_bf16"}],
    ids=["avx2", "plain avx512"],
)
def test_lesser_processors_compute_the_same(
    kernels: library.Library, tiny: Callable[[str], Tiny], lacking: set[str]
) -> None:
    lesser = library.load_for(build.target_for(build.cpu_flags() - lacking))
    model, tokens = tiny("qwen3"), tokens_for(90)
    for weights in ("bf16", "int8"):
        found = last_logits(native(model, weights, of=lesser), sequence(tokens, list(range(6))), [33, 30, 1, 26])
        assert error_of(found, model.logits(tokens), [33, 63, 64, 90]) < TIMES_BF16[weights] * bound(model, tokens)


def test_without_a_compiler_torch_computes(
    tiny: Callable[[str], Tiny], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(library, "library_for", build.library_for.__wrapped__)
    description = describe(resolve(str(tiny("llama").folder)), "bfloat16")
    with capture_logs() as logs:
        engine = load_engine(description, blocks=4)
    assert isinstance(engine, TorchEngine)
    assert [entry["log_level"] for entry in logs] == ["warning"]
    assert "no C++ compiler" in logs[0]["reason"]
    with pytest.raises(ConfigError, match="no C\\+\\+ compiler"):
        load_engine(description, blocks=4, kernels="native")


def test_a_compiler_that_fails_is_one_line(monkeypatch: pytest.MonkeyPatch, tiny: Callable[[str], Tiny]) -> None:
    monkeypatch.setenv("CXX", "false")
    monkeypatch.setattr(library, "library_for", build.library_for.__wrapped__)
    with pytest.raises(NativeUnavailable, match="can't compile the kernels: status 1") as caught:
        native(tiny("llama"))
    assert "\n" not in str(caught.value)


def test_which_engine_serves(kernels: library.Library, tiny: Callable[[str], Tiny]) -> None:
    folder = resolve(str(tiny("llama").folder))
    assert isinstance(load_engine(describe(folder, "bfloat16"), blocks=4), NativeEngine)
    assert isinstance(load_engine(describe(folder, "bfloat16"), blocks=4, kernels="torch"), TorchEngine)
    with capture_logs() as logs:
        assert isinstance(load_engine(describe(folder, "float32"), blocks=4), TorchEngine)
    assert len(logs) == 1
    with pytest.raises(ConfigError, match="kernels: auto, native, torch"):
        load_engine(describe(folder, "float32"), blocks=4, kernels="fast")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="weights: "):
        load_engine(describe(folder, "float32"), blocks=4, weights="int3")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="kv_dtype"):
        describe(folder, "float32", kv_dtype="int8")
    with pytest.raises(ConfigError, match="needs the native kernels"):
        load_engine(describe(folder, "bfloat16", kv_dtype="int8"), blocks=4, kernels="torch")


def test_targets_follow_the_processor() -> None:
    avx2 = {"avx2", "fma", "f16c"}
    assert build.target_for(frozenset(avx2)).name == "avx2"
    wide = avx2 | {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
    assert build.target_for(frozenset(wide | {"avx512_bf16"})).name == "avx512+bf16"
    with pytest.raises(NativeUnavailable, match="AVX2"):
        build.target_for(frozenset({"sse2"}))


def test_a_profile_says_where_the_time_goes(kernels: library.Library, tiny: Callable[[str], Tiny]) -> None:
    engine = native(tiny("llama"))
    engine.warm_up()
    assert not any(engine.model.profile(True).values())
    engine.step([Work(Sequence(bytes(16), tokens_for(60), 60, [0, 1, 2, 3], 0, Sampling()), 60)])
    assert all(engine.model.profile(False).values())
    assert engine.model.weight_bytes > 0
