"""A model's weights for torch: projections that read the same input are fused into one matrix."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

from baton.engine.files.config import ModelConfig
from baton.engine.files.tensors import TensorSource


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One decoder layer; matrices are [out, in], norms float32. `qkv` stacks the rows of all query heads, then keys,
    then values; `gate_up` those of gate and up."""

    input_norm: torch.Tensor
    qkv: torch.Tensor
    qkv_bias: torch.Tensor | None
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    output: torch.Tensor
    output_bias: torch.Tensor | None
    mlp_norm: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor


@dataclass(frozen=True, slots=True)
class ModelWeights:
    """`head` is `embedding` itself if the two are tied."""

    embedding: torch.Tensor
    layers: tuple[LayerWeights, ...]
    norm: torch.Tensor
    head: torch.Tensor

    @property
    def bytes(self) -> int:
        """Of all tensors, each counted once."""
        inside = (getattr(layer, each.name) for layer in self.layers for each in fields(layer))
        tensors = [each for each in (*inside, self.embedding, self.norm, self.head) if each is not None]
        return sum({id(tensor): tensor.nbytes for tensor in tensors}.values())


@dataclass(frozen=True, slots=True)
class _Loader:
    """Copies tensors out of a source into their final dtype, device and place."""

    source: TensorSource
    dtype: torch.dtype
    device: torch.device

    def stacked(self, parts: list[tuple[str, int]], columns: int | None) -> torch.Tensor:
        """The named tensors with the rows of each, one above the other; vectors if `columns` is None."""
        tail = () if columns is None else (columns,)
        # Read first: a damaged header's shapes are refused before they are allocated.
        read = [self.source.read(name, (rows, *tail)) for name, rows in parts]
        whole = torch.empty((sum(rows for _, rows in parts), *tail), dtype=self.dtype, device=self.device)
        start = 0
        for part in read:
            whole[start : start + len(part)].copy_(part)
            start += len(part)
        return whole

    def matrix(self, name: str, rows: int, columns: int) -> torch.Tensor:
        return self.stacked([(name, rows)], columns)

    def norm(self, name: str, size: int) -> torch.Tensor:
        return self.source.read(name, (size,)).to(self.device, torch.float32)


def load_weights(source: TensorSource, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> ModelWeights:
    """Raises ModelFileError for a tensor that is missing or has another shape."""
    loader = _Loader(source, dtype, device)
    embedding = loader.matrix("model.embed_tokens.weight", config.vocabulary, config.hidden)
    return ModelWeights(
        embedding=embedding,
        layers=tuple(_layer(loader, config, index) for index in range(config.layers)),
        norm=loader.norm("model.norm.weight", config.hidden),
        head=embedding if config.tied_embeddings else loader.matrix("lm_head.weight", config.vocabulary, config.hidden),
    )


def _layer(loader: _Loader, config: ModelConfig, index: int) -> LayerWeights:
    prefix = f"model.layers.{index}"
    attention = f"{prefix}.self_attn"
    queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
    rows = {"q_proj": queries, "k_proj": keys, "v_proj": keys}

    def qkv(kind: str) -> list[tuple[str, int]]:
        return [(f"{attention}.{name}.{kind}", count) for name, count in rows.items()]

    def head_norm(name: str) -> torch.Tensor | None:
        return loader.norm(f"{attention}.{name}.weight", config.head_dim) if config.qk_norm else None

    return LayerWeights(
        input_norm=loader.norm(f"{prefix}.input_layernorm.weight", config.hidden),
        qkv=loader.stacked(qkv("weight"), config.hidden),
        qkv_bias=loader.stacked(qkv("bias"), None) if config.attention_bias else None,
        q_norm=head_norm("q_norm"),
        k_norm=head_norm("k_norm"),
        output=loader.matrix(f"{attention}.o_proj.weight", config.hidden, queries),
        output_bias=loader.stacked([(f"{attention}.o_proj.bias", config.hidden)], None) if config.output_bias else None,
        mlp_norm=loader.norm(f"{prefix}.post_attention_layernorm.weight", config.hidden),
        gate_up=loader.stacked(
            [(f"{prefix}.mlp.gate_proj.weight", config.mlp), (f"{prefix}.mlp.up_proj.weight", config.mlp)],
            config.hidden,
        ),
        down=loader.matrix(f"{prefix}.mlp.down_proj.weight", config.hidden, config.mlp),
    )
