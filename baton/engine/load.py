"""Chooses the engine: the compiled kernels if they can serve, else plain torch."""

from __future__ import annotations

import structlog

from baton.config import KernelChoice, WeightChoice, require_choice
from baton.engine.files.card import ModelDescription
from baton.engine.kv import Buffer
from baton.engine.native.build import NativeUnavailable
from baton.engine.native.engine import NativeEngine
from baton.engine.torch.engine import TorchEngine, resolve_device
from baton.errors import ConfigError

QUANTISED = ("int8", "int4")
"""Formats of weights that only the native kernels have."""
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

    Without a compiler, on an old processor and in float32 the kernels can't serve: then torch computes, and the reason
    is logged, if `kernels` is "auto"; "native" raises ConfigError. ConfigError is also raised for what torch lacks:
    `weights` in 8 or 4 bits, and `deterministic`, since it sums in another order for another batch.
    """
    require_choice("kernels", kernels, KernelChoice)
    require_choice("weights", weights, WeightChoice)
    reason = ""
    if kernels != "torch" and resolve_device(device).type == "cpu":
        try:
            return NativeEngine.load(description, buffer=buffer, blocks=blocks, weights=weights)
        except NativeUnavailable as error:
            if kernels == "native":
                raise ConfigError(f"kernels: {error}") from None
            reason = str(error)
    if deterministic:
        why = f", but {reason}" if reason else "; torch sums in another order for another batch"
        raise ConfigError(f"deterministic: needs the native kernels{why}")
    if weights in QUANTISED:
        why = f", but {reason}" if reason else "; torch has no such weights"
        raise ConfigError(f"weights: {weights} needs the native kernels{why}")
    if reason:
        log.warning("computing with torch, which is slower", reason=reason)
    return TorchEngine.load(description, device=device, buffer=buffer, blocks=blocks)
