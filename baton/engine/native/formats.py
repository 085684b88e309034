"""The matrices and vectors that a checkpoint is packed as, their formats and their size in memory; see matrix.h.

Needs no torch.
"""

from __future__ import annotations

from collections.abc import Iterator

from baton.config import WeightChoice
from baton.engine.files.config import ModelConfig
from baton.engine.native.library import EMBEDDING, HEAD, OUTSIDE, Format, Slot, Source, Vector

Parts = list[tuple[str, int]]
"""Named tensors and the rows of each, stacked in this order."""
OWN_GRIDS = {"Q4_0": (Source.Q4_0, Format.INT4), "Q4_1": (Source.Q4_1, Format.INT4), "Q8_0": (Source.Q8_0, Format.INT8)}
"""By GGUF's name of a tensor's type: the types that a packed format holds exactly."""
_FORMATS = {"auto": Format.BF16, "bf16": Format.BF16, "int8": Format.INT8, "int4": Format.INT4}
"""By `--weights`, for floats."""
_PANEL, _GROUP, _LINE = 16, 32, 64
_GROUP_BYTES = {Format.BF16: 1024, Format.INT8: 544, Format.INT4: 320}
"""Of a group of 32 inputs for a panel of 16 outputs."""


def own_grid(kinds: set[str]) -> tuple[Source, Format] | None:
    """The grid of a matrix whose parts are stored as these `kinds`; None for floats and for a mixture."""
    return OWN_GRIDS.get(next(iter(kinds))) if len(kinds) == 1 else None


def keeps_8_bits(layer: int, slot: int) -> bool:
    """Whether 4 bits would cost a matrix too much quality, as of all but output and gate; see docs/quality.md."""
    return layer == OUTSIDE or slot not in (Slot.OUTPUT, Slot.GATE)


def format_of(choice: WeightChoice, own: tuple[Source, Format] | None, layer: int, slot: int) -> Format:
    """The format of a matrix whose own grid is `own`."""
    if own is not None and choice in ("auto", "int4"):
        return own[1]
    if choice == "int4" and keeps_8_bits(layer, slot):
        return Format.INT8
    return _FORMATS[choice]


def model_matrices(config: ModelConfig) -> Iterator[tuple[int, int, Parts, int]]:
    """(layer, slot, parts, columns) of every matrix to pack; a head that is the embedding comes once."""
    head = "model.embed_tokens.weight" if config.tied_embeddings else "lm_head.weight"
    yield OUTSIDE, HEAD, [(head, config.vocabulary)], config.hidden
    if not config.tied_embeddings:
        yield OUTSIDE, EMBEDDING, [("model.embed_tokens.weight", config.vocabulary)], config.hidden
    for layer in range(config.layers):
        for slot, parts, columns in layer_matrices(config, layer):
            yield layer, slot, parts, columns


def layer_matrices(config: ModelConfig, layer: int) -> Iterator[tuple[Slot, Parts, int]]:
    """(slot, parts, columns) of a layer's matrices, in the order of `Slot`."""
    attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
    yield Slot.QKV, _qkv(config, layer, "weight"), config.hidden
    yield Slot.OUTPUT, [(f"{attention}.o_proj.weight", config.hidden)], config.heads * config.head_dim
    yield Slot.GATE, [(f"{mlp}.gate_proj.weight", config.mlp)], config.hidden
    yield Slot.UP, [(f"{mlp}.up_proj.weight", config.mlp)], config.hidden
    yield Slot.DOWN, [(f"{mlp}.down_proj.weight", config.hidden)], config.mlp


def layer_vectors(config: ModelConfig, layer: int) -> Iterator[tuple[Vector, Parts]]:
    prefix, attention = f"model.layers.{layer}", f"model.layers.{layer}.self_attn"
    yield Vector.INPUT_NORM, [(f"{prefix}.input_layernorm.weight", config.hidden)]
    yield Vector.MLP_NORM, [(f"{prefix}.post_attention_layernorm.weight", config.hidden)]
    if config.qk_norm:
        yield Vector.Q_NORM, [(f"{attention}.q_norm.weight", config.head_dim)]
        yield Vector.K_NORM, [(f"{attention}.k_norm.weight", config.head_dim)]
    if config.attention_bias:
        yield Vector.QKV_BIAS, _qkv(config, layer, "bias")
    if config.output_bias:
        yield Vector.OUTPUT_BIAS, [(f"{attention}.o_proj.bias", config.hidden)]


def packed_bytes(form: Format, outputs: int, inputs: int) -> int:
    """Memory of a packed matrix: whole panels of whole groups, each panel in whole cache lines."""
    panel = -(-inputs // _GROUP) * _GROUP_BYTES[form]
    return -(-outputs // _PANEL) * -(-panel // _LINE) * _LINE


def _qkv(config: ModelConfig, layer: int, kind: str) -> Parts:
    rows = {"q": config.heads, "k": config.kv_heads, "v": config.kv_heads}
    return [
        (f"model.layers.{layer}.self_attn.{name}_proj.{kind}", heads * config.head_dim) for name, heads in rows.items()
    ]
