"""The compiled kernels: near the reference in every format, and the same bits however a sequence is computed."""

from __future__ import annotations

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
from baton.engine.files.card import describe
from baton.engine.files.models import resolve
from baton.engine.files.tensors import open_tensors
from baton.engine.load import load_engine
from baton.engine.native import build, library
from baton.engine.native import weights as native_weights
from baton.engine.native.build import NativeUnavailable
from baton.engine.native.calibration import Calibration, text_tokens
from baton.engine.native.engine import NativeEngine
from baton.engine.native.formats import layer_matrices
from baton.engine.native.library import Format, Slot
from baton.engine.torch.engine import TorchEngine
from baton.errors import ConfigError
from baton.spec import Sampling
from tests.engine.conftest import VARIANTS, Tiny, kernels_without, make_tiny, tokens_for
from tests.engine.files.test_files import write_gguf
from tests.engine.torch.test_model import last_logits, sequence

Logits = np.ndarray

TIMES_BF16 = {"bf16": 1.0, "int8": 4.0, "int4": 20.0}
"""How far from float32 each format may be, in terms of torch's own bf16. The tiny models' random weights suffer from
rounding far more than trained ones do: what a format costs those is the embedded model's test."""


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
    """The error of torch's bf16, which rounds at the same places, over positions enough; and a quarter for accident."""
    engine = model.engine("bfloat16")
    counts = [16] * (len(tokens) // 16)
    found = last_logits(engine, sequence(tokens, list(range(32))), counts)
    return 1.25 * error_of(found, model.logits(tokens), np.cumsum(counts).tolist())


@pytest.mark.parametrize("variant", VARIANTS)
def test_as_near_the_reference_as_torch_however_it_is_cut(
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


@pytest.mark.parametrize(
    ("gate", "up"), [(Format.BF16, Format.INT8), (Format.INT8, Format.BF16), (Format.INT4, Format.INT8)]
)
def test_gate_and_up_may_differ_in_format(
    kernels: library.Library, tiny: Callable[[str], Tiny], monkeypatch: pytest.MonkeyPatch, gate: Format, up: Format
) -> None:
    """As in a file that holds one of them in floats."""
    formats = {Slot.GATE: gate, Slot.UP: up}

    def chosen(choice: WeightChoice, own: object, layer: int, slot: int) -> Format:
        return Format.BF16 if layer == library.OUTSIDE else formats.get(Slot(slot), Format.BF16)

    monkeypatch.setattr(native_weights, "format_of", chosen)
    model, tokens = tiny("llama"), tokens_for(160)
    counts = [33, 30, 1, 26, 20, 20, 29, 1]
    found = last_logits(native(model), sequence(tokens, list(range(10))), counts)
    times = TIMES_BF16["int4" if Format.INT4 in (gate, up) else "int8"]
    assert error_of(found, model.logits(tokens), np.cumsum(counts).tolist()) < times * bound(model, tokens)


@pytest.mark.parametrize(("kv_dtype", "times"), [("auto", 1.0), ("int8", 1.6)])
@pytest.mark.parametrize(
    ("hidden", "heads", "kv_heads", "dim"),
    [(96, 6, 2, 16), (96, 4, 4, 24), (90, 9, 3, 64), (96, 8, 1, 64), (96, 2, 1, 128), (96, 3, 3, 80)],
)
def test_heads_of_any_shape_stay_near_the_reference(
    kernels: library.Library, tmp_path: Path, hidden: int, heads: int, kv_heads: int, dim: int,
    kv_dtype: str, times: float,
) -> None:  # fmt: skip
    shape: dict[str, Any] = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": dim}
    model = make_tiny(tmp_path, "llama", hidden_size=hidden, intermediate_size=72, **shape)
    tokens, counts = tokens_for(200), [70, 1, 50, 1, 20, 1, 56, 1]
    found = last_logits(native(model, "bf16", kv_dtype), sequence(tokens, list(range(13))), counts)
    error = error_of(found, model.logits(tokens), np.cumsum(counts).tolist())
    assert error < times * bound(model, tokens)


def test_blocks_beyond_a_sequence_are_not_seen(kernels: library.Library, tiny: Callable[[str], Tiny]) -> None:
    """What an earlier sequence left in a block, even what is no number, counts for nothing."""
    model, tokens = tiny("llama"), tokens_for(20)
    for counts in ([20], [1] * 20):
        clean, dirty = native(model), native(model)
        dirty.pool.blocks.fill_(float("nan"))
        found = last_logits(dirty, sequence(tokens, [7, 2]), counts)
        np.testing.assert_array_equal(found[-1], last_logits(clean, sequence(tokens, [7, 2]), counts)[-1])


def test_waking_changes_nothing(kernels: library.Library, tiny: Callable[[str], Tiny]) -> None:
    """Neither the blocks, which a peer may be writing, nor what the next step computes."""
    model, tokens = tiny("llama"), tokens_for(40)
    found = []
    for wakes in (False, True):
        engine, whole = native(model), sequence(tokens, [3, 1, 2])
        engine.step([Work(whole, 39)])
        if wakes:
            engine.wake([2, 0, 63])
            engine.wake([])
        found.append((engine.logits([Work(whole, 1)])[0], engine.pool.blocks.clone()))
    assert np.array_equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


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


def test_int4_counts_errors_by_the_inputs_mean_squares(kernels: library.Library, tiny: Callable[[str], Tiny]) -> None:
    """Weighted error against the plain grid, whose ends are a group's extremes: less in all, and in no group more."""
    model = tiny("llama")
    reference = model.reference.model
    seen: list[torch.Tensor] = []
    hook = reference.layers[1].mlp.gate_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.inference_mode():
        reference(text_tokens((model.folder / "tokenizer.json").read_bytes()))
    hook.remove()
    engine = native(model, "int4")
    weights = reference.layers[1].mlp.gate_proj.weight.detach().numpy()
    found = np.stack([engine.model.row(1, library.Slot.GATE, row, weights.shape[1]) for row in range(len(weights))])
    importance = np.tile(seen[0].square().mean((0, 1)).numpy(), len(weights)).reshape(-1, 32)
    groups = weights.reshape(-1, 32)
    least, most = groups.min(1, keepdims=True), groups.max(1, keepdims=True)
    minimum = least.astype(np.float16).astype(np.float32)
    scale = ((most - least) / 15).astype(np.float16).astype(np.float32)
    plain = np.clip(np.rint((groups - minimum) / scale), 0, 15) * scale + minimum
    ours, theirs = (((kept - groups) ** 2 * importance).sum(1) for kept in (found.reshape(-1, 32), plain))
    assert (ours <= theirs * (1 + 1e-4)).all()
    assert ours.sum() < 0.85 * theirs.sum()


@pytest.mark.parametrize("variant", ["llama-bias-linear", "mistral", "qwen2", "qwen3"])
def test_calibration_computes_what_the_model_does(tiny: Callable[[str], Tiny], variant: str) -> None:
    """The mean squares of what enters each matrix of the last layer, as in the reference."""
    model = tiny(variant)
    description = model.describe()
    config, tokenizer_json = description.config, description.card.tokenizer_json
    layer, seen = model.reference.model.layers[-1], {}
    slots = {Slot.QKV: layer.self_attn.q_proj, Slot.OUTPUT: layer.self_attn.o_proj, Slot.GATE: layer.mlp.gate_proj}
    slots |= {Slot.UP: layer.mlp.up_proj, Slot.DOWN: layer.mlp.down_proj}
    for slot, module in slots.items():
        module.register_forward_pre_hook(lambda _, inputs, slot=slot: seen.update({slot: inputs[0]}))
    with torch.inference_mode():
        model.reference(text_tokens(tokenizer_json))
    calibration = Calibration(open_tensors(description.model, config), config, tokenizer_json)
    for index in range(config.layers):
        for slot, parts, columns in layer_matrices(config, index):
            if index == config.layers - 1:
                expected = seen[slot].square().mean((0, 1)).numpy()
                np.testing.assert_allclose(calibration.importance(), expected, rtol=1e-3)
            calibration.advance(index, slot, parts, columns)


@pytest.mark.parametrize(
    "lacking",
    [pytest.param({"avx512f"}, marks=pytest.mark.nightly), {"avx512_vnni", "avx512_bf16"}],
    ids=["avx2", "plain avx512"],
)
def test_lesser_processors_compute_the_same(
    kernels: library.Library, tiny: Callable[[str], Tiny], lacking: set[str]
) -> None:
    lesser = kernels_without(lacking)
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


def test_dtype_and_kernels_decide_which_engine_serves(kernels: library.Library, tiny: Callable[[str], Tiny]) -> None:
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
    with pytest.raises(ConfigError, match=r"^weights: int4 needs the native kernels; torch has no such weights"):
        load_engine(describe(folder, "bfloat16"), blocks=4, kernels="torch", weights="int4")
    with pytest.raises(ConfigError, match=r"^weights: int8 needs the native kernels, but the kernels keep KV in"):
        load_engine(describe(folder, "float32"), blocks=4, weights="int8")


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
