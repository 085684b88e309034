"""A model's memory from its metadata alone: reads no weight and needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from baton.config import WeightChoice
from baton.engine.files.config import ModelConfig, from_gguf, from_hf
from baton.engine.files.gguf_file import GgufFile, gguf_name
from baton.engine.files.metadata import read_json
from baton.engine.files.models import ResolvedModel
from baton.engine.native.formats import format_of, layer_vectors, model_matrices, own_grid, packed_bytes
from baton.model import KvLayout

KV_DTYPES = ("bfloat16", "int8", "float32")


@dataclass(frozen=True, slots=True)
class Estimate:
    """`weight_bytes` are by `--weights`; "float32" is for `--dtype float32`."""

    config: ModelConfig
    parameters: int
    weight_bytes: dict[str, int]

    def layout(self, kv_dtype: str) -> KvLayout:
        return KvLayout(self.config.layers, self.config.kv_heads, self.config.head_dim, kv_dtype)


def estimate(model: ResolvedModel) -> Estimate:
    """Raises ModelFileError for metadata that is missing, damaged or of an unsupported model."""
    file = GgufFile(model.path) if model.is_gguf else None
    config = from_hf(read_json(model.path / "config.json")) if file is None else from_gguf(file)
    vectors = config.layers * sum(size for _, parts in layer_vectors(config, 0) for _, size in parts)
    matrices = sum(rows * columns for _, _, parts, columns in model_matrices(config) for _, rows in parts)
    parameters = matrices + vectors + config.hidden  # the last are the final norm's
    sizes = {choice: _packed(config, file, choice) for choice in get_args(WeightChoice)}
    return Estimate(config, parameters, sizes | {"float32": 4 * parameters})


def _packed(config: ModelConfig, file: GgufFile | None, choice: WeightChoice) -> int:
    total = 0
    for layer, slot, parts, columns in model_matrices(config):
        own = own_grid({"" if file is None else file.quantisation(gguf_name(name)) for name, _ in parts})
        total += packed_bytes(format_of(choice, own, layer, slot), sum(rows for _, rows in parts), columns)
    return total
