"""Reading GGUF files: the header, and tensors dequantised to float32.

`gguf.GGUFReader` takes seconds for a vocabulary of 50,000 pieces and reports damage as whatever exception numpy
raises; this reader takes a fraction of a second and checks every bound. The dequantisation is the library's own.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from baton.engine.files.metadata import Metadata
from baton.errors import ModelFileError

FloatArray = npt.NDArray[np.float32]

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_FLOATS = {GGMLQuantizationType.F32: np.float32, GGMLQuantizationType.F16: np.float16}
_MAX_DIMENSIONS = 4
_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
LAYER_TENSOR = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A tensor's place in the file, in bytes. `shape` is in row-major order: (out, in) for a projection."""

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    offset: int
    size: int


class GgufFile:
    """A mapped GGUF file. Raises ModelFileError, with file and cause in one line, for any damage."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._map = _map_file(path)
        cursor = _Cursor(self._map, path)
        try:
            self.metadata, self.tensors = self._read_header(cursor)
        except (struct.error, UnicodeDecodeError, ValueError) as error:
            raise ModelFileError(f"{path}: corrupt GGUF header: {error}") from None

    def read(self, name: str) -> FloatArray:
        """One tensor as float32, in the header's shape."""
        tensor = self._tensor(name)
        raw = np.frombuffer(self._map, np.uint8, tensor.size, tensor.offset)
        if tensor.kind in _FLOATS:
            return raw.view(_FLOATS[tensor.kind]).reshape(tensor.shape).astype(np.float32)
        try:
            values = dequantize(raw.reshape(_long_rows(tensor.shape), -1), tensor.kind)
        except (NotImplementedError, ValueError) as error:
            raise ModelFileError(f"{self.path}: tensor {name}: {tensor.kind.name} can't be read: {error}") from None
        result: FloatArray = values.reshape(tensor.shape)
        return result

    def quantisation(self, name: str) -> str:
        """The name of a tensor's type, such as Q4_1; empty for plain floats."""
        kind = self._tensor(name).kind
        return "" if kind in _FLOATS or kind is GGMLQuantizationType.BF16 else kind.name

    def read_blocks(self, name: str) -> tuple[npt.NDArray[np.uint8], tuple[int, ...]]:
        """A tensor's bytes, a view that keeps the file mapped, and its shape."""
        tensor = self._tensor(name)
        return np.frombuffer(self._map, np.uint8, tensor.size, tensor.offset), tensor.shape

    def _tensor(self, name: str) -> GgufTensor:
        tensor = self.tensors.get(name)
        if tensor is None:
            raise ModelFileError(f"{self.path}: tensor {name} is missing")
        return tensor

    def _read_header(self, cursor: _Cursor) -> tuple[Metadata, dict[str, GgufTensor]]:
        if cursor.take(4) != b"GGUF":
            raise ModelFileError(f"{self.path}: not a GGUF file")
        version = cursor.scalar("I")
        if version not in (2, 3):
            raise ModelFileError(f"{self.path}: GGUF version {version} is not supported, only 2 and 3")
        tensor_count, key_count = cursor.scalar("Q"), cursor.scalar("Q")
        values = {}
        for _ in range(key_count):
            key = cursor.string()
            values[key] = cursor.value(cursor.scalar("I"))
        metadata = Metadata(str(self.path), values)
        infos = [_tensor_info(cursor) for _ in range(tensor_count)]
        alignment = metadata.positive("general.alignment", 32)
        start = -(-cursor.offset // alignment) * alignment
        tensors = [self._place(start, *info) for info in infos]
        return metadata, {tensor.name: tensor for tensor in tensors}

    def _place(self, start: int, name: str, shape: tuple[int, ...], kind: int, offset: int) -> GgufTensor:
        quantisation = GGMLQuantizationType(kind)
        block, block_bytes = GGML_QUANT_SIZES[quantisation]
        if shape[-1] % block:
            raise ModelFileError(f"{self.path}: tensor {name!r}: rows of {shape[-1]} are not whole blocks of {block}")
        size = math.prod(shape) // block * block_bytes
        if start + offset + size > len(self._map):
            raise ModelFileError(
                f"{self.path}: truncated: tensor {name!r} ends at byte {start + offset + size}, "
                f"the file at {len(self._map)}"
            )
        return GgufTensor(name, shape, quantisation, start + offset, size)


def gguf_name(name: str) -> str:
    """A GGUF file's name for the tensor that a Hugging Face checkpoint calls `name`."""
    match = LAYER_TENSOR.fullmatch(name)
    if match is None:
        return _NAMES[name]
    layer, module, kind = match.groups()
    return f"blk.{layer}.{_LAYER_NAMES[module]}.{kind}"


def _long_rows(shape: tuple[int, ...]) -> int:
    """The number of rows to dequantise a tensor as: the library takes 16 rows a call, so that long rows cost fewer."""
    rows = math.prod(shape[:-1])
    return rows // math.gcd(rows, 32)


def _map_file(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise ModelFileError(f"{path}: {error.strerror or error}") from None
    except ValueError:
        raise ModelFileError(f"{path}: the file is empty") from None


def _tensor_info(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """(name, shape, type, offset from the start of the data)."""
    name = cursor.string()
    dimensions = cursor.scalar("I")
    if not 1 <= dimensions <= _MAX_DIMENSIONS:
        raise ValueError(f"tensor {name!r} has {dimensions} dimensions")
    shape = tuple(reversed([cursor.scalar("Q") for _ in range(dimensions)]))
    if not all(shape):
        raise ValueError(f"tensor {name!r} has an empty dimension")
    return name, shape, cursor.scalar("I"), cursor.scalar("Q")


class _Cursor:
    """Reads little-endian values one after the other. Raises ModelFileError at the end of the file."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self._data, self._path, self.offset = data, path, 0

    def take(self, size: int) -> bytes:
        end = self.offset + size
        if end > len(self._data):
            raise ModelFileError(f"{self._path}: truncated: the header goes on past the file's {len(self._data)} bytes")
        piece = self._data[self.offset : end]
        self.offset = end
        return piece

    def scalar(self, code: str) -> int:
        value: int = struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]
        return value

    def string(self) -> str:
        return self.take(self.scalar("Q")).decode()

    def value(self, kind: int) -> object:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self._array(self.scalar("I"), self.scalar("Q"))
        if kind not in _SCALARS:
            raise ValueError(f"unknown value type {kind}")
        return self.scalar(_SCALARS[kind])

    def _array(self, kind: int, count: int) -> list[object]:
        if kind in _SCALARS:
            code = f"<{count}{_SCALARS[kind]}"
            return list(struct.unpack(code, self.take(struct.calcsize(code))))
        if kind != _STRING:
            raise ValueError(f"arrays of value type {kind} are not supported")
        return [self.string() for _ in range(count)]
