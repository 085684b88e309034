"""Which engine serves: the compiled kernels where they can be had, plain torch elsewhere."""

from __future__ import annotations

from typing import get_args

import structlog

from baton.config import KernelChoice, WeightChoice
from baton.engine.files.card import ModelDescription
from baton.engine.kv import Buffer
from baton.engine.native.build import NativeUnavailable
from baton.engine.native.engine import NativeEngine
from baton.engine.torch.engine import TorchEngine, resolve_device
from baton.errors import ConfigError

QUANTISED = ("int8", "int4")
"""Weights that only the native kernels have."""
log = structlog.get_logger(__name__)


def load_engine(
    description: ModelDescription,
    *,
    device: str = "cpu",
    buffer: Buffer | None = None,
    blocks: int | None = None,
    kernels: KernelChoice = "auto",
    weights: WeightChoice = "auto",
    deterministic: bool = False,
) -> NativeEngine | TorchEngine:
    """An engine ready for `warm_up`; the pool as for `TorchEngine.load`.

    With `kernels` "auto", whatever keeps the kernels from serving (no compiler, an old processor, float32) is logged
    once and torch computes; with "native" it is a ConfigError. So it is with `weights` in 8 or 4 bits, which torch
    does not have, and with `deterministic`, which torch can't keep: it sums in another order for another batch.
    """
    if kernels not in get_args(KernelChoice):
        raise ConfigError(f"kernels: {', '.join(get_args(KernelChoice))}, not {kernels!r}")
    if weights not in get_args(WeightChoice):
        raise ConfigError(f"weights: {', '.join(get_args(WeightChoice))}, not {weights!r}")
    if kernels != "torch" and resolve_device(device).type == "cpu":
        try:
            return NativeEngine.load(description, buffer=buffer, blocks=blocks, weights=weights)
        except NativeUnavailable as error:
            if kernels == "native":
                raise ConfigError(f"kernels: {error}") from None
            if deterministic:
                raise ConfigError(f"deterministic: needs the native kernels, but {error}") from None
            if weights in QUANTISED:
                raise ConfigError(f"weights: {weights} needs the native kernels, but {error}") from None
            log.warning("computing with torch, which is slower", reason=str(error))
    if deterministic:
        raise ConfigError("deterministic: needs the native kernels; torch sums in another order for another batch")
    if weights in QUANTISED:
        raise ConfigError(f"weights: {weights} needs the native kernels; torch has no such weights")
    return TorchEngine.load(description, device=device, buffer=buffer, blocks=blocks)
