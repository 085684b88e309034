"""The compiled library as Python sees it. Calls release the GIL; see abi.cpp for what each does."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, byref, c_double, c_float, c_int, c_int32, c_int64, c_uint64, c_void_p
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from baton.engine.files.config import ModelConfig
from baton.engine.native.build import BuildTarget, cpu_flags, library_for, target_for


class Format(IntEnum):
    """What a packed matrix holds; see matrix.h."""

    BF16 = 1
    INT8 = 2
    INT4 = 3


class Source(IntEnum):
    """What weights come as."""

    F32 = 0
    Q4_0 = 1
    Q4_1 = 2
    Q8_0 = 3


class Slot(IntEnum):
    """The matrices of a layer."""

    QKV = 0
    OUTPUT = 1
    GATE = 2
    UP = 3
    DOWN = 4


class Vector(IntEnum):
    """The vectors of a layer."""

    INPUT_NORM = 0
    MLP_NORM = 1
    Q_NORM = 2
    K_NORM = 3
    QKV_BIAS = 4
    OUTPUT_BIAS = 5


OUTSIDE = -1
"""The layer number of what belongs to none: matrices HEAD and EMBEDDING, and the final norm."""
HEAD, EMBEDDING = 0, 1
KV_FORMATS = {"bfloat16": 0, "int8": 1}
PARTS = ("embed", "round", "qkv", "rotate", "attend", "output", "gate+up", "down", "head")
"""What a profile tells apart, in the order of profile.h."""
SPAN = np.dtype([("start", "i4"), ("count", "i4"), ("position", "i4"), ("_", "i4"), ("table", "u8")])

Array = npt.NDArray[np.generic]


class _Config(ctypes.Structure):
    _fields_ = (
        *((name, c_int32) for name in ("layers", "hidden", "heads", "kv_heads", "head_dim", "mlp", "vocabulary")),
        ("kv_format", c_int32),
        ("eps", c_float),
        ("rope_scale", c_float),
    )


class _Batch(ctypes.Structure):
    _fields_ = (
        *((name, c_int32) for name in ("rows", "spans", "sampled")),
        *((name, c_void_p) for name in ("tokens", "span", "sampled_rows", "logits")),
    )


@dataclass(frozen=True, slots=True)
class Library:
    """The loaded kernels and what they were compiled for."""

    target: BuildTarget
    calls: ctypes.CDLL


def load() -> Library:
    """The kernels for this processor, compiled first where need be. Raises NativeUnavailable."""
    return load_for(target_for(cpu_flags()))


def load_for(target: BuildTarget) -> Library:
    """The kernels for a target, which the processor must be able to run."""
    return Library(target, _bind(library_for(target)))


@cache
def _bind(path: Path) -> ctypes.CDLL:
    calls = ctypes.CDLL(str(path))
    calls.baton_open.restype = c_void_p
    calls.baton_open.argtypes = (POINTER(_Config), c_void_p)
    calls.baton_close.restype = None
    calls.baton_close.argtypes = (c_void_p,)
    calls.baton_shape.argtypes = (c_void_p, *(c_int,) * 5)
    calls.baton_pack.argtypes = (c_void_p, *(c_int,) * 5, *(c_void_p,) * 3)
    calls.baton_row.restype = None
    calls.baton_row.argtypes = (c_void_p, *(c_int,) * 3, c_void_p)
    calls.baton_vector.argtypes = (c_void_p, c_int, c_int, c_void_p, c_int)
    calls.baton_step.argtypes = (c_void_p, c_void_p, POINTER(_Batch))
    calls.baton_bytes.restype = c_int64
    calls.baton_bytes.argtypes = (c_void_p,)
    calls.baton_checksum.restype = c_uint64
    calls.baton_checksum.argtypes = (c_void_p,)
    calls.baton_touch.restype = None
    calls.baton_touch.argtypes = (c_void_p, c_void_p, c_void_p, c_int64, c_int64)
    calls.baton_profile.restype = None
    calls.baton_profile.argtypes = (c_void_p, c_int, c_void_p)
    return calls


class NativeModel:
    """A model in the library's own memory. MemoryError where that runs out."""

    def __init__(
        self, library: Library, config: ModelConfig, kv_dtype: str, inverse: npt.NDArray[np.float32], rope_scale: float
    ) -> None:
        """`inverse` are the rotary frequencies [head_dim / 2]."""
        assert inverse.dtype == np.float32, "frequencies are float32"
        assert len(inverse) == config.head_dim // 2, "one frequency per pair of dimensions"
        self.library = library
        self._calls = library.calls
        shape = _Config(
            config.layers, config.hidden, config.heads, config.kv_heads, config.head_dim, config.mlp,
            config.vocabulary, KV_FORMATS[kv_dtype], config.rms_eps, rope_scale,
        )  # fmt: skip
        self._handle = self._calls.baton_open(byref(shape), inverse.ctypes.data)
        if not self._handle:
            raise MemoryError("no memory for a model")

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self._calls.baton_close(self._handle)

    def shape(self, layer: int, slot: int, form: Format, outputs: int, inputs: int) -> None:
        """Makes room for a matrix."""
        _check(self._calls.baton_shape(self._handle, layer, slot, form, outputs, inputs))

    def pack(
        self, layer: int, slot: int, first: int, rows: int, source: Source, data: Array,
        order: npt.NDArray[np.int32] | None = None, importance: npt.NDArray[np.float32] | None = None,
    ) -> None:  # fmt: skip
        """Packs `rows` rows of `data` as rows [first, first + rows); the i-th is row `order[i]` of the data, or i.

        `importance` [inputs] is what an input's squared error counts where floats become 4 bits; None: all alike.
        """
        assert data.flags.c_contiguous, "rows follow each other"
        assert importance is None or importance.dtype == np.float32, "importance is float32"
        where = None if order is None else order.ctypes.data
        weights = None if importance is None else importance.ctypes.data
        _check(self._calls.baton_pack(self._handle, layer, slot, first, rows, source, data.ctypes.data, where, weights))

    def row(self, layer: int, slot: int, row: int, inputs: int) -> npt.NDArray[np.float32]:
        """A packed row as numbers."""
        out = np.empty(inputs, np.float32)
        self._calls.baton_row(self._handle, layer, slot, row, out.ctypes.data)
        return out

    def vector(self, layer: int, slot: int, data: npt.NDArray[np.float32]) -> None:
        """Sets a vector of a layer."""
        assert data.dtype == np.float32, "vectors are float32"
        _check(self._calls.baton_vector(self._handle, layer, slot, data.ctypes.data, len(data)))

    def step(
        self, pool: int, tokens: npt.NDArray[np.int32], spans: Array, sampled: npt.NDArray[np.int32], logits: Array
    ) -> None:
        """Computes `tokens` [rows] over the pool at address `pool`; `spans` are of dtype SPAN and cover the rows.

        `logits`, float32 [at least len(sampled), vocabulary], gets those of the rows `sampled`.
        """
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
        """Bytes of all packed matrices."""
        return int(self._calls.baton_bytes(self._handle))

    def checksum(self) -> int:
        """Of all packed matrices, 64 bits; reads them once."""
        return int(self._calls.baton_checksum(self._handle))

    def profile(self, on: bool) -> dict[str, float]:
        """Starts or stops timing; returns the seconds per part since the last call."""
        seconds = (c_double * len(PARTS))()
        self._calls.baton_profile(self._handle, on, ctypes.addressof(seconds))
        return dict(zip(PARTS, seconds, strict=True))


def _check(status: int) -> None:
    if status:
        raise MemoryError("the kernels have no memory left")
