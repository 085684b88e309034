"""A checkpoint packed for the kernels: each matrix in the file's own grid where it has one, or in a chosen format."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from baton.config import WeightChoice
from baton.engine.files.config import ModelConfig
from baton.engine.files.tensors import TensorSource
from baton.engine.native.calibration import Calibration
from baton.engine.native.formats import OWN_GRIDS, format_of, keeps_8_bits, layer_matrices
from baton.engine.native.library import EMBEDDING, HEAD, OUTSIDE, Format, Library, NativeModel, Slot, Source, Vector
from baton.engine.torch import rope


@dataclass(frozen=True, slots=True)
class _Packer:
    """Reads tensors out of a source and packs them."""

    model: NativeModel
    source: TensorSource
    choice: WeightChoice
    calibration: Calibration | None

    def matrix(self, layer: int, slot: int, parts: list[tuple[str, int]], columns: int) -> None:
        """The named tensors, of so many rows each, one above the other."""
        kinds = {self.source.kind(name) for name, _ in parts}
        own = OWN_GRIDS.get(next(iter(kinds))) if len(kinds) == 1 else None
        form = format_of(self.choice, own, layer, slot)
        keeps_grid = own is not None and own[1] is form and columns % 32 == 0
        self.model.shape(layer, slot, form, sum(rows for _, rows in parts), columns)
        first = 0
        for name, rows in parts:
            if keeps_grid and own is not None:
                blocks = self.source.blocks(name, (rows, columns))
                self.model.pack(layer, slot, first, rows, own[0], blocks.data, blocks.order)
            else:
                numbers = self.source.read(name, (rows, columns)).float().contiguous().numpy()
                importance = None
                if self.calibration is not None and form is Format.INT4:
                    importance = self.calibration.importance()
                self.model.pack(layer, slot, first, rows, Source.F32, numbers, importance=importance)
            first += rows
        if self.calibration is not None and layer != OUTSIDE:
            self.calibration.advance(layer, Slot(slot), parts, columns)

    def vector(self, layer: int, slot: int, parts: list[tuple[str, int]]) -> None:
        """The named vectors, one after the other."""
        read = [self.source.read(name, (size,)).float() for name, size in parts]
        self.model.vector(layer, slot, torch.cat(read).numpy())


def load_model(
    library: Library,
    source: TensorSource,
    config: ModelConfig,
    kv_dtype: str,
    choice: WeightChoice,
    tokenizer_json: bytes,
) -> NativeModel:
    """Packs all weights. "auto" keeps a file's own 4-bit and 8-bit grids exactly and the rest in bf16.

    Floats that become 4 bits are rounded by what a text, cut by `tokenizer_json`, multiplies them with.
    Raises ModelFileError where the files lack a tensor or have it in another shape.
    """
    inverse, scale = rope.frequencies(config)
    model = NativeModel(library, config, kv_dtype, np.ascontiguousarray(inverse.numpy()), scale)
    calibration = Calibration(source, config, tokenizer_json) if _rounds_to_4_bits(source, config, choice) else None
    packer = _Packer(model, source, choice, calibration)
    head = "model.embed_tokens.weight" if config.tied_embeddings else "lm_head.weight"
    packer.matrix(OUTSIDE, HEAD, [(head, config.vocabulary)], config.hidden)
    if not config.tied_embeddings:
        packer.matrix(OUTSIDE, EMBEDDING, [("model.embed_tokens.weight", config.vocabulary)], config.hidden)
    packer.vector(OUTSIDE, 0, [("model.norm.weight", config.hidden)])
    for layer in range(config.layers):
        _layer(packer, config, layer)
    return model


def _rounds_to_4_bits(source: TensorSource, config: ModelConfig, choice: WeightChoice) -> bool:
    """Whether any matrix in floats gets 4 bits."""
    return choice == "int4" and any(
        source.kind(name) not in OWN_GRIDS and not keeps_8_bits(layer, slot)
        for layer in range(config.layers)
        for slot, parts, _ in layer_matrices(config, layer)
        for name, _ in parts
    )


def _layer(packer: _Packer, config: ModelConfig, layer: int) -> None:
    prefix = f"model.layers.{layer}"
    attention = f"{prefix}.self_attn"
    queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
    rows = {"q_proj": queries, "k_proj": keys, "v_proj": keys}
    for slot, parts, columns in layer_matrices(config, layer):
        packer.matrix(layer, slot, parts, columns)
    packer.vector(layer, Vector.INPUT_NORM, [(f"{prefix}.input_layernorm.weight", config.hidden)])
    packer.vector(layer, Vector.MLP_NORM, [(f"{prefix}.post_attention_layernorm.weight", config.hidden)])
    if config.qk_norm:
        packer.vector(layer, Vector.Q_NORM, [(f"{attention}.q_norm.weight", config.head_dim)])
        packer.vector(layer, Vector.K_NORM, [(f"{attention}.k_norm.weight", config.head_dim)])
    if config.attention_bias:
        packer.vector(layer, Vector.QKV_BIAS, [(f"{attention}.{name}.bias", n) for name, n in rows.items()])
    if config.output_bias:
        packer.vector(layer, Vector.OUTPUT_BIAS, [(f"{attention}.o_proj.bias", config.hidden)])
