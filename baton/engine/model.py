"""The forward pass of a Llama-family decoder over the flat tokens of a step."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from baton.engine import rope
from baton.engine.attention import attend
from baton.engine.config import ModelConfig
from baton.engine.kv import KvPool
from baton.engine.plan import Plan
from baton.engine.weights import LayerWeights, ModelWeights


class Model:
    """Weights and how to compute with them; holds nothing of a sequence."""

    def __init__(self, config: ModelConfig, weights: ModelWeights) -> None:
        self._config = config
        self._weights = weights
        inverse, self._rope_scaling = rope.frequencies(config)
        self._inverse_frequencies = inverse.to(weights.embedding.device)

    @property
    def weight_bytes(self) -> int:
        """Of all tensors, each counted once."""
        return self._weights.bytes

    def forward(self, plan: Plan, pool: KvPool) -> torch.Tensor:
        """Writes the KV of the step's tokens and returns float32 logits [sampled rows, vocabulary]."""
        weights = self._weights
        hidden = F.embedding(plan.tokens, weights.embedding)
        cos, sin = rope.tables(self._inverse_frequencies, self._rope_scaling, plan.positions, hidden.dtype)
        for index, layer in enumerate(weights.layers):
            hidden = hidden + self._attention(index, layer, hidden, cos, sin, plan, pool)
            hidden = hidden + self._mlp(layer, hidden)
        last = self._norm(hidden[plan.sampled_rows], weights.norm)
        return F.linear(last, weights.head).float()

    def _attention(
        self,
        index: int,
        layer: LayerWeights,
        hidden: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        plan: Plan,
        pool: KvPool,
    ) -> torch.Tensor:
        heads, kv_heads, dim = self._config.heads, self._config.kv_heads, self._config.head_dim
        qkv = F.linear(self._norm(hidden, layer.input_norm), layer.qkv, layer.qkv_bias)
        queries, keys, values = qkv.view(len(hidden), -1, dim).tensor_split((heads, heads + kv_heads), 1)
        if layer.q_norm is not None and layer.k_norm is not None:
            queries, keys = self._norm(queries, layer.q_norm), self._norm(keys, layer.k_norm)
        queries, keys = rope.rotate(queries, cos, sin), rope.rotate(keys, cos, sin)
        pool.write(index, plan.blocks, plan.offsets, torch.stack((keys, values), 1))
        found = attend(pool, index, plan, queries, keys, values)
        return F.linear(found.flatten(1), layer.output, layer.output_bias)

    def _mlp(self, layer: LayerWeights, hidden: torch.Tensor) -> torch.Tensor:
        gate, up = F.linear(self._norm(hidden, layer.mlp_norm), layer.gate_up).chunk(2, -1)
        return F.linear(F.silu(gate) * up, layer.down)

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """RMSNorm (arXiv 1910.07467) over the last dimension; torch works it out in float32 for narrower dtypes."""
        return F.rms_norm(x, weight.shape, weight, self._config.rms_eps)
