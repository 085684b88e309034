"""Which format a weight matrix is packed in, and the memory that takes; see matrix.h. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterator

from baton.config import WeightChoice
from baton.engine.files.config import ModelConfig
from baton.engine.native.library import OUTSIDE, Format, Slot, Source

OWN_GRIDS = {
    "Q4_0": (Source.Q4_0, Format.INT4),
    "Q4_1": (Source.Q4_1, Format.INT4),
    "Q8_0": (Source.Q8_0, Format.INT8),
}
"""By GGUF's name of a tensor's type: those that a format holds exactly."""
_CHOSEN = {"bf16": Format.BF16, "int8": Format.INT8, "int4": Format.INT4}
_PANEL, _GROUP, _LINE = 16, 32, 64
_GROUP_BYTES = {Format.BF16: 1024, Format.INT8: 544, Format.INT4: 320}
"""Of a group of 32 inputs for a panel of 16 outputs."""


def keeps_8_bits(layer: int, slot: int) -> bool:
    """What 4 bits cost too much of: embedding and head, queries, keys and values, up and down. Why: docs/quality.md."""
    return layer == OUTSIDE or slot not in (Slot.OUTPUT, Slot.GATE)


def format_of(choice: WeightChoice, own: tuple[Source, Format] | None, layer: int, slot: int) -> Format:
    """The format of a matrix whose own grid is `own`."""
    if choice == "auto":
        return own[1] if own is not None else Format.BF16  # nobody asked for other weights than the file's
    if choice == "int4" and own is not None:
        return own[1]
    if choice == "int4" and keeps_8_bits(layer, slot):
        return Format.INT8
    return _CHOSEN[choice]


def layer_matrices(config: ModelConfig, layer: int) -> Iterator[tuple[Slot, list[tuple[str, int]], int]]:
    """A layer's matrices, in the order of `Slot`: the tensors of each with their rows, and its columns."""
    attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
    queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
    rows = {"q_proj": queries, "k_proj": keys, "v_proj": keys}
    yield Slot.QKV, [(f"{attention}.{name}.weight", count) for name, count in rows.items()], config.hidden
    yield Slot.OUTPUT, [(f"{attention}.o_proj.weight", config.hidden)], queries
    yield Slot.GATE, [(f"{mlp}.gate_proj.weight", config.mlp)], config.hidden
    yield Slot.UP, [(f"{mlp}.up_proj.weight", config.mlp)], config.hidden
    yield Slot.DOWN, [(f"{mlp}.down_proj.weight", config.hidden)], config.mlp


def packed_bytes(form: Format, outputs: int, inputs: int) -> int:
    """Memory of a packed matrix: whole panels of whole groups, each panel in whole cache lines."""
    panel = -(-inputs // _GROUP) * _GROUP_BYTES[form]
    return -(-outputs // _PANEL) * -(-panel // _LINE) * _LINE
