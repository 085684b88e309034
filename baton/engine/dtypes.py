"""Which number format to compute and keep KV in; torch-free, so that a card can be read without it."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from baton.errors import ConfigError

_COMPUTED = ("float32", "bfloat16", "float16")
_BF16_INSTRUCTIONS = frozenset({"avx512_bf16", "amx_bf16"})


def resolve_dtype(name: str, device: str) -> str:
    """What to compute in. "auto" is bfloat16 where the hardware multiplies it, else float32."""
    if name == "auto":
        return "bfloat16" if device.startswith("cuda") or _cpu_has_bf16() else "float32"
    if name not in _COMPUTED:
        raise ConfigError(f"dtype must be auto, {', '.join(_COMPUTED)}, not {name!r}")
    return name


def resolve_kv_dtype(name: str, computed: str) -> str:
    """A dtype of `KvLayout`: the `computed` one for "auto", or int8, which needs bfloat16 beside it. ConfigError."""
    if name == "auto" or name == computed:
        return computed
    if name != "int8" or computed != "bfloat16":
        raise ConfigError(f"kv_dtype must be auto, or int8 with dtype bfloat16, not {name!r} with {computed}")
    return name


@cache
def _cpu_has_bf16() -> bool:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return False  # no Linux: float32 is right everywhere
    flags = next((line for line in lines if line.startswith("flags")), "")
    return not _BF16_INSTRUCTIONS.isdisjoint(flags.split())
