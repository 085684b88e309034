"""Model files: other architectures as GGUF, and every kind of damage, which must end in one line that says what."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf.quants import quantize

from baton.engine.files.card import describe
from baton.engine.files.config import from_hf
from baton.engine.files.gguf_file import GgufFile, gguf_name
from baton.engine.files.metadata import Metadata
from baton.engine.files.models import ResolvedModel, resolve
from baton.engine.torch.engine import TorchEngine
from baton.errors import ModelFileError
from tests.engine.conftest import CONTEXT, VOCABULARY, Tiny, tokens_for
from tests.engine.torch.test_model import assert_close, last_logits, sequence

Q8 = gguf.GGMLQuantizationType.Q8_0


def write_gguf(tiny: Tiny, path: Path, architecture: str, quantised: gguf.GGMLQuantizationType | None = None) -> Path:
    """What llama.cpp's converter would write of a tiny model."""
    config = tiny.reference.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim if hasattr(config, "head_dim") else 16)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(["a", "b", "ab", *(f"t{index}" for index in range(3, VOCABULARY))])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(2)
    writer.add_eot_token_id(5)
    for name, value in tiny.reference.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        add_tensor(writer, tiny, name, value.numpy(), architecture, quantised)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_tensor(
    writer: gguf.GGUFWriter,
    tiny: Tiny,
    name: str,
    value: np.ndarray,
    architecture: str,
    quantised: gguf.GGMLQuantizationType | None,
) -> None:
    config = tiny.reference.config
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    owner = name.split(".")[-2]
    if architecture == "llama" and owner in heads:
        value = value.reshape(heads[owner], 2, -1, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)
    if quantised is not None and value.ndim == 2 and "embed" not in name:
        writer.add_tensor(gguf_name(name), quantize(value, quantised), raw_dtype=quantised)
    else:
        writer.add_tensor(gguf_name(name), np.ascontiguousarray(value))


@pytest.mark.parametrize(("variant", "architecture"), [("llama", "llama"), ("qwen2", "qwen2"), ("qwen3", "qwen3")])
def test_gguf_of_each_architecture(
    tiny: Callable[[str], Tiny], tmp_path: Path, variant: str, architecture: str
) -> None:
    model = tiny(variant)
    description = describe(resolve(str(write_gguf(model, tmp_path / "m.gguf", architecture))), "float32")
    tokens = tokens_for(40)
    found = last_logits(TorchEngine.load(description, blocks=4), sequence(tokens, [0, 1, 2]), [39, 1])
    assert_close(found, model.logits(tokens), [39, 40])
    assert description.card.eos_token_ids == (2, 5)


def test_quantised_gguf_is_near(tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    model = tiny("llama")
    path = write_gguf(model, tmp_path / "m.gguf", "llama", quantised=Q8)
    tokens = tokens_for(40)
    engine = TorchEngine.load(describe(resolve(str(path)), "float32"), blocks=4)
    found = last_logits(engine, sequence(tokens, [0, 1, 2]), [40])[0]
    assert np.corrcoef(found, model.logits(tokens)[-1].numpy())[0, 1] > 0.99


def test_our_reader_agrees_with_the_librarys(embedded: ResolvedModel) -> None:
    ours = GgufFile(embedded.path)
    assert ours.metadata.integer("llama.block_count") == 30
    assert len(ours.tensors) == 272
    tensor = ours.tensors["blk.3.attn_k.weight"]
    raw = np.fromfile(embedded.path, np.uint8, tensor.size, offset=tensor.offset)
    expected = gguf.quants.dequantize(raw.reshape(192, -1), tensor.kind)
    assert np.array_equal(ours.read(tensor.name), expected)


@pytest.fixture
def gguf_path(tiny: Callable[[str], Tiny], tmp_path: Path) -> Path:
    return write_gguf(tiny("llama"), tmp_path / "m.gguf", "llama")


@pytest.mark.parametrize("share", [0.0, 0.00001, 0.0001, 0.001, 0.005, 0.01, 0.02, 0.3, 0.999])
def test_a_truncated_gguf_is_refused_in_one_line(gguf_path: Path, share: float) -> None:
    data = gguf_path.read_bytes()
    gguf_path.write_bytes(data[: int(len(data) * share)])
    assert_one_line(gguf_path, "truncated|empty")


@pytest.mark.parametrize("seed", range(40))
def test_corrupt_gguf_header_never_escapes_as_another_error(gguf_path: Path, seed: int) -> None:
    data = bytearray(gguf_path.read_bytes())
    for at in np.random.default_rng(seed).integers(0, 6000, 30):
        data[at] = (data[at] * 31 + 97) % 256
    gguf_path.write_bytes(bytes(data))
    message = ""
    try:
        TorchEngine.load(describe(resolve(str(gguf_path)), "float32"), blocks=1)
    except ModelFileError as error:
        message = str(error)
    assert "\n" not in message
    assert not message or str(gguf_path) in message  # what was hit may also have been without effect


def test_what_is_no_gguf_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"PK\x03\x04" + bytes(1000))
    assert_one_line(path, "not a GGUF file")


def assert_one_line(path: Path, cause: str) -> None:
    with pytest.raises(ModelFileError, match=cause) as caught:
        TorchEngine.load(describe(resolve(str(path)), "float32"), blocks=1)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.fixture
def folder(tiny: Callable[[str], Tiny], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny("llama").folder, tmp_path / "model"))


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_truncated_safetensors_is_refused_in_one_line(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert_one_line(folder, "not a whole safetensors file")


def test_a_missing_tensor_is_named(folder: Path) -> None:
    edit(folder / "config.json", num_hidden_layers=4)
    assert_one_line(folder, r"tensor model\.layers\.3\.\S+ is missing")


def test_a_tensor_of_another_shape_is_named(folder: Path) -> None:
    edit(folder / "config.json", intermediate_size=64)
    assert_one_line(folder, r"gate_proj\.weight has shape \[128, 96\], the config asks for \[64, 96\]")


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"model_type": "mamba"}, "architecture 'mamba' is not supported"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1.0}}, "rope scaling 'longrope'"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"num_key_value_heads": 4}, "6 heads can't share 4"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"num_hidden_layers": "three"}, "num_hidden_layers must be an integer"),
        ({"model_type": "mistral", "sliding_window": 100}, "sliding window of 100 tokens"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    ],
)
def test_a_config_that_can_not_be_computed_is_refused_by_field(
    folder: Path, changes: dict[str, object], cause: str
) -> None:
    edit(folder / "config.json", **changes)
    assert_one_line(folder, cause)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_broken_or_missing_json_is_refused_in_one_line(folder: Path, name: str) -> None:
    (folder / name).write_text('{"half": ')
    assert_one_line(folder, "not valid JSON|not a tokeniser")
    (folder / name).unlink()
    assert_one_line(folder, "No such file|has no config.json")


def test_a_folder_without_weights_is_refused_in_one_line(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert_one_line(folder, "has neither model.safetensors nor")


def test_an_index_may_not_lead_outside(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": "../other.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_one_line(folder, "outside the folder")


def test_old_and_new_spellings_of_rope_mean_the_same() -> None:
    base: dict[str, object] = {
        "model_type": "qwen2",
        "num_attention_heads": 4,
        "hidden_size": 64,
        "max_position_embeddings": 4096,
        "num_hidden_layers": 1,
        "intermediate_size": 64,
        "vocab_size": 10,
        "rms_norm_eps": 1e-6,
        "sliding_window": 1024,
        "use_sliding_window": False,
    }
    yarn = {"factor": 4.0, "original_max_position_embeddings": 1024}
    old = base | {"rope_theta": 1e6, "rope_scaling": {"type": "yarn", **yarn}}
    new = base | {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, **yarn}}
    first, second = (from_hf(Metadata("config.json", values)) for values in (old, new))
    assert first == second
    assert (first.rope_theta, first.rope_scaling.kind, first.attention_bias) == (1e6, "yarn", True)
