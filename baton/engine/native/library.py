"""Python's side of the compiled library. Calls release the GIL; abi.cpp documents each."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, byref, c_double, c_float, c_int, c_int32, c_int64, c_uint64, c_void_p
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from baton.engine.files.config import ModelConfig
from baton.engine.native.build import BuildTarget, library_for, target_for
from baton.engine.processor import cpu_flags

Format = IntEnum("Format", "BF16 INT8 INT4", start=1)
"""The number format of a packed matrix, as in matrix.h."""
Source = IntEnum("Source", "F32 Q4_0 Q4_1 Q8_0", start=0)
"""The number format of unpacked weights, as in matrix.h."""
Slot = IntEnum("Slot", "QKV OUTPUT GATE UP DOWN", start=0)
"""The matrices of a layer, as in model.h."""
Vector = IntEnum("Vector", "INPUT_NORM MLP_NORM Q_NORM K_NORM QKV_BIAS OUTPUT_BIAS", start=0)
"""The vectors of a layer, as in model.h."""
OUTSIDE = -1
"""The layer number of the matrices HEAD and EMBEDDING and of the final norm."""
HEAD, EMBEDDING = 0, 1
KV_FORMATS = {"bfloat16": 0, "int8": 1}
PARTS = ("embed", "round", "qkv", "rotate", "attend", "output", "gate+up", "down", "head")
"""Parts of a profile, in the order of profile.h."""
SPAN = np.dtype([("start", "i4"), ("count", "i4"), ("position", "i4"), ("_", "i4"), ("table", "u8")])

_SHAPE = ("layers", "hidden", "heads", "kv_heads", "head_dim", "mlp", "vocabulary")
"""Fields of `ModelConfig` that the kernels' configuration begins with."""

Array = npt.NDArray[np.generic]


class _Config(ctypes.Structure):
    _fields_ = (*((name, c_int32) for name in (*_SHAPE, "kv_format")), ("eps", c_float), ("rope_scale", c_float))


class _Batch(ctypes.Structure):
    _fields_ = (
        *((name, c_int32) for name in ("rows", "spans", "sampled")),
        *((name, c_void_p) for name in ("tokens", "span", "sampled_rows", "logits")),
    )


_SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "baton_open": (c_void_p, (POINTER(_Config), c_void_p)),
    "baton_close": (None, (c_void_p,)),
    "baton_shape": (c_int, (c_void_p, *(c_int,) * 5)),
    "baton_pack": (c_int, (c_void_p, *(c_int,) * 5, *(c_void_p,) * 3)),
    "baton_row": (None, (c_void_p, *(c_int,) * 3, c_void_p)),
    "baton_vector": (c_int, (c_void_p, c_int, c_int, c_void_p, c_int)),
    "baton_step": (c_int, (c_void_p, c_void_p, POINTER(_Batch))),
    "baton_bytes": (c_int64, (c_void_p,)),
    "baton_checksum": (c_uint64, (c_void_p,)),
    "baton_touch": (None, (c_void_p, c_void_p, c_void_p, c_int64, c_int64)),
    "baton_profile": (None, (c_void_p, c_int, c_void_p)),
    "baton_copy_blocks": (None, (*(c_void_p,) * 4, c_int64, c_int64)),
}
"""Result and parameters of each call."""


@dataclass(frozen=True, slots=True)
class Library:
    """The loaded kernels and the target they were compiled for."""

    target: BuildTarget
    calls: ctypes.CDLL

    def copy_blocks(self, target: int, source: int, targets: Sequence[int], sources: Sequence[int], size: int) -> None:
        """A `kvtransfer.blocks.memory.BlockCopy` with stores that bypass the cache, one call for all blocks."""
        assert len(targets) == len(sources), "one target for each source"
        array = c_int64 * len(targets)
        self.calls.baton_copy_blocks(target, source, array(*targets), array(*sources), len(targets), size)


def load() -> Library:
    """The kernels for this processor, compiled unless cached. Raises NativeUnavailable."""
    return load_for(target_for(cpu_flags()))


def load_for(target: BuildTarget) -> Library:
    """The kernels for a target, which the processor must be able to run."""
    return Library(target, _bind(library_for(target)))


@cache
def _bind(path: Path) -> ctypes.CDLL:
    calls = ctypes.CDLL(str(path))
    for name, (result, parameters) in _SIGNATURES.items():
        call = getattr(calls, name)
        call.restype, call.argtypes = result, parameters
    return calls


class NativeModel:
    """A model in the library's own memory. Raises MemoryError when that runs out."""

    def __init__(
        self, library: Library, config: ModelConfig, kv_dtype: str, inverse: npt.NDArray[np.float32], rope_scale: float
    ) -> None:
        """`inverse` are the rotary frequencies [head_dim / 2]."""
        assert inverse.dtype == np.float32, "frequencies are float32"
        assert len(inverse) == config.head_dim // 2, "one frequency per pair of dimensions"
        self.library = library
        self._calls = library.calls
        numbers = (getattr(config, name) for name in _SHAPE)
        shape = _Config(*numbers, KV_FORMATS[kv_dtype], config.rms_eps, rope_scale)
        self._handle = self._calls.baton_open(byref(shape), inverse.ctypes.data)
        if not self._handle:
            raise MemoryError("no memory for a model")

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self._calls.baton_close(self._handle)

    def shape(self, layer: int, slot: int, form: Format, outputs: int, inputs: int) -> None:
        """Allocates a matrix."""
        _check(self._calls.baton_shape(self._handle, layer, slot, form, outputs, inputs))

    def pack(
        self, layer: int, slot: int, first: int, rows: int, source: Source, data: Array,
        order: npt.NDArray[np.int32] | None = None, importance: npt.NDArray[np.float32] | None = None,
    ) -> None:  # fmt: skip
        """Packs rows of `data` as rows [first, first + rows); the i-th is row `order[i]` of the data, or row i.
        `importance` [inputs] weighs each input's squared error when floats become 4 bits; None weighs all alike."""
        assert data.flags.c_contiguous, "rows follow each other"
        assert importance is None or importance.dtype == np.float32, "importance is float32"
        where = None if order is None else order.ctypes.data
        weights = None if importance is None else importance.ctypes.data
        _check(self._calls.baton_pack(self._handle, layer, slot, first, rows, source, data.ctypes.data, where, weights))

    def row(self, layer: int, slot: int, row: int, inputs: int) -> npt.NDArray[np.float32]:
        """A packed row as float32 [inputs]."""
        out = np.empty(inputs, np.float32)
        self._calls.baton_row(self._handle, layer, slot, row, out.ctypes.data)
        return out

    def vector(self, layer: int, slot: int, data: npt.NDArray[np.float32]) -> None:
        assert data.dtype == np.float32, "vectors are float32"
        _check(self._calls.baton_vector(self._handle, layer, slot, data.ctypes.data, len(data)))

    def step(
        self, pool: int, tokens: npt.NDArray[np.int32], spans: Array, sampled: npt.NDArray[np.int32], logits: Array
    ) -> None:
        """Computes `tokens` [rows] over the pool at address `pool`; `spans`, of dtype SPAN, cover the rows. Writes the
        logits of the rows `sampled` to `logits`, float32 [at least len(sampled), vocabulary]."""
        assert spans.dtype == SPAN, "spans as the library lays them out"
        batch = _Batch(
            len(tokens), len(spans), len(sampled),
            tokens.ctypes.data, spans.ctypes.data, sampled.ctypes.data, logits.ctypes.data,
        )  # fmt: skip
        _check(self._calls.baton_step(self._handle, pool, byref(batch)))

    def touch(self, pool: int, blocks: npt.NDArray[np.int64], block_bytes: int) -> None:
        """Reads a byte of every page of the weights and of these blocks of the pool at address `pool`."""
        self._calls.baton_touch(self._handle, pool, blocks.ctypes.data, len(blocks), block_bytes)

    @property
    def weight_bytes(self) -> int:
        return int(self._calls.baton_bytes(self._handle))

    def checksum(self) -> int:
        """64 bits over all packed matrices; reads them once."""
        return int(self._calls.baton_checksum(self._handle))

    def profile(self, on: bool) -> dict[str, float]:
        """Starts or stops timing; returns the seconds of each part since the last call."""
        seconds = (c_double * len(PARTS))()
        self._calls.baton_profile(self._handle, on, ctypes.addressof(seconds))
        return dict(zip(PARTS, seconds, strict=True))


def _check(status: int) -> None:
    if status:
        raise MemoryError("the kernels have no memory left")
