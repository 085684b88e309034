"""Rotary position embeddings: frequencies, tables and rotation.

Rotation (Su et al., RoFormer, arXiv 2104.09864) in the half-split convention of Hugging Face checkpoints: dimensions i
and i + head_dim / 2 rotate together. Scaling: linear (position interpolation, arXiv 2306.15595), llama3 (the Llama 3.1
release), yarn (arXiv 2309.00071).
"""

from __future__ import annotations

import math

import torch

from baton.engine.files.config import ModelConfig, RopeScaling
from baton.errors import ModelFileError


def frequencies(config: ModelConfig) -> tuple[torch.Tensor, float]:
    """(inverse frequencies, float32 [head_dim / 2]; the factor of cosine and sine)."""
    scaling, dim = config.rope_scaling, config.head_dim
    powers = torch.arange(0, dim, 2, dtype=torch.int64).float() / dim
    inverse = 1.0 / (config.rope_theta**powers)
    match scaling.kind:
        case "none":
            return inverse, 1.0
        case "linear":
            return inverse / scaling.factor, 1.0
        case "llama3":
            return _llama3(inverse, scaling), 1.0
        case "yarn":
            return _yarn(inverse, scaling, dim, config.rope_theta), _yarn_attention(scaling)
        case "factors":
            if len(scaling.factors) != len(inverse):
                raise ModelFileError(f"{len(scaling.factors)} rope factors do not fit {len(inverse)} frequencies")
            return inverse / torch.tensor(scaling.factors), 1.0


def tables(
    inverse: torch.Tensor, attention_scaling: float, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of `positions` [T], each float32 [T, 1, head_dim / 2]."""
    angles = (positions.float()[:, None] * inverse)[:, None]
    return angles.cos() * attention_scaling, angles.sin() * attention_scaling


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """`x` [T, heads, head_dim] rotated: a new tensor, float32 like the tables."""
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def _llama3(inverse: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    """Frequencies of long wavelengths are divided by the factor, of short ones kept, between them interpolated."""
    original, low, high = scaling.original_context_tokens, scaling.low_freq_factor, scaling.high_freq_factor
    wavelength = 2 * math.pi / inverse
    smooth = (original / wavelength - low) / (high - low)
    between = (1 - smooth) * inverse / scaling.factor + smooth * inverse
    scaled = torch.where(wavelength > original / low, inverse / scaling.factor, inverse)
    is_between = (wavelength <= original / low) & (wavelength >= original / high)
    return torch.where(is_between, between, scaled)


def _yarn(inverse: torch.Tensor, scaling: RopeScaling, dim: int, theta: float) -> torch.Tensor:
    """Dimensions that rotate often within the original context are kept, those that rotate rarely interpolated."""

    def dimension(rotations: float) -> float:
        turns = scaling.original_context_tokens / (rotations * 2 * math.pi)
        return dim * math.log(turns) / (2 * math.log(theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = (high - low) or 0.001  # a ramp of no width would divide by zero
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    return inverse / scaling.factor * ramp + inverse * (1 - ramp)


def _yarn_attention(scaling: RopeScaling) -> float:
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return _mscale(scaling.factor, scaling.mscale) / _mscale(scaling.factor, scaling.mscale_all_dim)
    return _mscale(scaling.factor, 1.0)


def _mscale(factor: float, multiplier: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * multiplier * math.log(factor) + 1.0
