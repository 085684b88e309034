"""Reads weights from a GGUF file or a folder of safetensors, by Hugging Face's names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open

from baton.engine.files.config import ModelConfig
from baton.engine.files.gguf_file import LAYER_TENSOR, GgufFile, gguf_name
from baton.engine.files.metadata import read_json
from baton.engine.files.models import INDEX, ResolvedModel
from baton.errors import ModelFileError


class TensorSource(Protocol):
    """Gives tensors one by one, so that loading holds at most one beside the finished weights."""

    def read(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """The tensor on the CPU, of any floating dtype. Raises ModelFileError for one that is missing, unreadable or
        of another shape."""

    def kind(self, name: str) -> str:
        """GGUF's name of the type that the tensor is stored in; empty for plain floats."""

    def blocks(self, name: str, shape: tuple[int, ...]) -> Blocks:
        """The tensor's quantised blocks as stored, for a `kind` that is not empty."""


@dataclass(frozen=True, slots=True)
class Blocks:
    """Quantised rows as a GGUF file holds them. Row i of the tensor is row `order[i]` of `data`; with None, row i."""

    data: npt.NDArray[np.uint8]
    order: npt.NDArray[np.int32] | None


def open_tensors(model: ResolvedModel, config: ModelConfig) -> TensorSource:
    """Raises ModelFileError for files that can't be opened."""
    return GgufTensors(GgufFile(model.path), config) if model.is_gguf else SafetensorsFolder(model)


class GgufTensors:
    """A TensorSource that dequantises."""

    def __init__(self, file: GgufFile, config: ModelConfig) -> None:
        self._file = file
        self._rotated_heads: dict[str, int] = {}
        if config.architecture in ("llama", "mistral"):
            self._rotated_heads = {"self_attn.q_proj": config.heads, "self_attn.k_proj": config.kv_heads}

    def read(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        tensor = torch.from_numpy(self._file.read(gguf_name(name)))
        _check_shape(f"{self._file.path}", gguf_name(name), tuple(tensor.shape), shape)
        heads = self._heads_to_reorder(name)
        return tensor if heads is None else _to_half_split(tensor, heads)

    def kind(self, name: str) -> str:
        return self._file.quantisation(gguf_name(name))

    def blocks(self, name: str, shape: tuple[int, ...]) -> Blocks:
        data, found = self._file.read_blocks(gguf_name(name))
        _check_shape(f"{self._file.path}", gguf_name(name), found, shape)
        heads = self._heads_to_reorder(name)
        if heads is None:
            return Blocks(data, None)
        return Blocks(data, _to_half_split(torch.arange(shape[0], dtype=torch.int32), heads).numpy())

    def _heads_to_reorder(self, name: str) -> int | None:
        match = LAYER_TENSOR.fullmatch(name)
        return self._rotated_heads.get(match.group(2)) if match else None


def _to_half_split(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Undoes the row order that llama.cpp's converter gives a Llama's queries and keys: it rotates dimensions 2i and
    2i + 1 together, `rope` rotates i and i + head_dim / 2."""
    return rows.view(heads, -1, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


class SafetensorsFolder:
    """A TensorSource over one safetensors file, or over shards with their index."""

    def __init__(self, model: ResolvedModel) -> None:
        self._folder = model.path
        self._shard_of: dict[str, Path] = {}
        self._open = {path: _open_shard(path) for path in model.weight_files()}
        for path, shard in self._open.items():
            names: list[str] = shard.keys()  # type: ignore[no-untyped-call]
            self._shard_of.update(dict.fromkeys(names, path))
        if len(self._open) > 1 and (model.path / INDEX).exists():
            promised = read_json(model.path / INDEX).section("weight_map")
            if missing := sorted(set(promised.names()) - set(self._shard_of)):
                raise promised.error(f"names {missing[0]}, which no shard holds")

    def read(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        path = self._shard_of.get(name)
        if path is None:
            raise ModelFileError(f"{self._folder}: tensor {name} is missing")
        try:
            tensor: torch.Tensor = self._open[path].get_tensor(name)  # type: ignore[no-untyped-call]
        except (SafetensorError, RuntimeError, ValueError) as error:
            raise ModelFileError(f"{path}: tensor {name}: {error}") from None
        _check_shape(str(path), name, tuple(tensor.shape), shape)
        if not tensor.is_floating_point() or tensor.element_size() < 2:
            raise ModelFileError(f"{path}: tensor {name} has dtype {tensor.dtype}, which is not supported")
        return tensor

    def kind(self, name: str) -> str:
        return ""

    def blocks(self, name: str, shape: tuple[int, ...]) -> Blocks:
        raise AssertionError("safetensors hold plain floats")


def _open_shard(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ModelFileError(f"{path}: not a whole safetensors file: {error}") from None


def _check_shape(source: str, name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if found != expected:
        raise ModelFileError(f"{source}: tensor {name} has shape {list(found)}, the config asks for {list(expected)}")
