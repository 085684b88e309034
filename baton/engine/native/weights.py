"""Packs a checkpoint for the kernels: each matrix in the file's own grid or in a chosen format."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from baton.config import WeightChoice
from baton.engine.files.config import ModelConfig
from baton.engine.files.tensors import TensorSource
from baton.engine.native.calibration import Calibration
from baton.engine.native.formats import Parts, format_of, keeps_8_bits, layer_vectors, model_matrices, own_grid
from baton.engine.native.library import OUTSIDE, Format, Library, NativeModel, Slot, Source
from baton.engine.torch import rope


@dataclass(frozen=True, slots=True)
class _Packer:
    model: NativeModel
    source: TensorSource
    choice: WeightChoice
    calibration: Calibration | None

    def matrix(self, layer: int, slot: int, parts: Parts, columns: int) -> None:
        own = own_grid({self.source.kind(name) for name, _ in parts})
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

    def vector(self, layer: int, slot: int, parts: Parts) -> None:
        read = [self.source.read(name, (size,)).float() for name, size in parts]
        self.model.vector(layer, slot, torch.cat(read).numpy())


def load_model(
    library: Library, source: TensorSource, config: ModelConfig, kv_dtype: str, choice: WeightChoice,
    tokenizer_json: bytes,
) -> NativeModel:  # fmt: skip
    """Packs all weights. "auto" keeps a file's own 4-bit and 8-bit grids exactly, and the rest in bf16.

    `tokenizer_json` cuts the text that calibrates the rounding of floats to 4 bits. Raises ModelFileError for a tensor
    that is missing or has another shape.
    """
    inverse, scale = rope.frequencies(config)
    model = NativeModel(library, config, kv_dtype, np.ascontiguousarray(inverse.numpy()), scale)
    calibration = Calibration(source, config, tokenizer_json) if _rounds_to_4_bits(source, config, choice) else None
    packer = _Packer(model, source, choice, calibration)
    for layer, slot, parts, columns in model_matrices(config):
        packer.matrix(layer, slot, parts, columns)
    packer.vector(OUTSIDE, 0, [("model.norm.weight", config.hidden)])
    for layer in range(config.layers):
        for vector, parts in layer_vectors(config, layer):
            packer.vector(layer, vector, parts)
    return model


def _rounds_to_4_bits(source: TensorSource, config: ModelConfig, choice: WeightChoice) -> bool:
    """Whether any matrix in floats gets 4 bits."""
    return choice == "int4" and any(
        not keeps_8_bits(layer, slot) and own_grid({source.kind(name)}) is None
        for layer, slot, parts, _ in model_matrices(config)
        for name, _ in parts
    )
