"""What a model takes in memory, from its metadata alone: no weight is read, and no torch is needed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import get_args

from baton.config import WeightChoice
from baton.engine.files import config as hf_config
from baton.engine.files import gguf_config
from baton.engine.files.config import ModelConfig
from baton.engine.files.gguf_file import GgufFile
from baton.engine.files.gguf_names import gguf_name
from baton.engine.files.metadata import read_json
from baton.engine.files.models import ResolvedModel
from baton.engine.native.formats import OWN_GRIDS, format_of, layer_matrices, packed_bytes
from baton.engine.native.library import EMBEDDING, HEAD, OUTSIDE
from kvtransfer.blocks.layout import KvLayout

KV_DTYPES = ("bfloat16", "int8", "float32")


@dataclass(frozen=True, slots=True)
class Estimate:
    """`weight_bytes` are by `--weights`, and "float32" for what `--dtype float32` computes with."""

    config: ModelConfig
    parameters: int
    weight_bytes: dict[str, int]

    def layout(self, kv_dtype: str) -> KvLayout:
        """Its KV blocks."""
        return KvLayout(self.config.layers, self.config.kv_heads, self.config.head_dim, kv_dtype)


@dataclass(frozen=True, slots=True)
class _Matrix:
    """The named tensors, of so many rows each, one above the other."""

    parts: tuple[tuple[str, int], ...]
    columns: int
    layer: int
    slot: int

    @property
    def rows(self) -> int:
        return sum(rows for _, rows in self.parts)


def estimate(model: ResolvedModel) -> Estimate:
    """Raises ModelFileError where the metadata is missing, damaged or of a model that can't be computed."""
    file = GgufFile(model.path) if model.is_gguf else None
    config = hf_config.from_hf(read_json(model.path / "config.json")) if file is None else gguf_config.from_gguf(file)
    matrices = list(_matrices(config))
    parameters = sum(matrix.rows * matrix.columns for matrix in matrices) + _vectors(config)
    sizes = {choice: _packed(matrices, file, choice) for choice in get_args(WeightChoice)}
    return Estimate(config, parameters, sizes | {"float32": 4 * parameters})


def _packed(matrices: list[_Matrix], file: GgufFile | None, choice: WeightChoice) -> int:
    total = 0
    for matrix in matrices:
        kinds = {"" if file is None else file.quantisation(gguf_name(name)) for name, _ in matrix.parts}
        own = OWN_GRIDS.get(next(iter(kinds))) if len(kinds) == 1 else None
        total += packed_bytes(format_of(choice, own, matrix.layer, matrix.slot), matrix.rows, matrix.columns)
    return total


def _matrices(config: ModelConfig) -> Iterator[_Matrix]:
    """As they are packed; a head that is the embedding comes once."""
    yield _Matrix((("model.embed_tokens.weight", config.vocabulary),), config.hidden, OUTSIDE, EMBEDDING)
    if not config.tied_embeddings:
        yield _Matrix((("lm_head.weight", config.vocabulary),), config.hidden, OUTSIDE, HEAD)
    for layer in range(config.layers):
        for slot, parts, columns in layer_matrices(config, layer):
            yield _Matrix(tuple(parts), columns, layer, slot)


def _vectors(config: ModelConfig) -> int:
    """Numbers in norms and biases."""
    layer = 2 * config.hidden
    layer += 2 * config.head_dim if config.qk_norm else 0
    layer += config.qkv_rows if config.attention_bias else 0
    layer += config.hidden if config.output_bias else 0
    return config.layers * layer + config.hidden
