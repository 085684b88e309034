"""The forward pass of a Llama-family decoder over the flat tokens of a step.

The residual stream, norms, rotation and logits are float32; operands of a layer's products, and their results, have
the weights' dtype.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from baton.engine.files.config import ModelConfig
from baton.engine.kv import KvPool
from baton.engine.torch import rope
from baton.engine.torch.attention import attend
from baton.engine.torch.plan import StepPlan
from baton.engine.torch.weights import LayerWeights, ModelWeights

HEAD_PART = 1 << 20
"""Elements of a narrow head to convert to float32 at a time, so that they stay in a core's cache."""


class Model:
    """The forward pass over `weights`; holds nothing of a sequence."""

    def __init__(self, config: ModelConfig, weights: ModelWeights) -> None:
        self._config, self.weights = config, weights
        inverse, self._rope_scaling = rope.frequencies(config)
        self._inverse_frequencies = inverse.to(weights.embedding.device)

    def forward(self, plan: StepPlan, pool: KvPool) -> torch.Tensor:
        """Writes the KV of the step's tokens and returns float32 logits [sampled rows, vocabulary]."""
        weights = self.weights
        hidden = F.embedding(plan.tokens, weights.embedding).float()
        cos, sin = rope.tables(self._inverse_frequencies, self._rope_scaling, plan.positions)
        for index, layer in enumerate(weights.layers):
            hidden = hidden + self._attention(index, layer, hidden, cos, sin, plan, pool)
            hidden = hidden + self._mlp(layer, hidden)
        return self._logits(self._norm(hidden[plan.sampled_rows], weights.norm))

    def _logits(self, last: torch.Tensor) -> torch.Tensor:
        """The logits of normalised rows, in float32: a narrow product would round large numbers whose small
        differences matter."""
        head = self.weights.head
        if head.dtype == torch.float32:
            return F.linear(last, head)
        parts = torch.split(head, max(1, HEAD_PART // head.shape[1]))
        return torch.cat([F.linear(last, part.float()) for part in parts], 1)

    def _attention(
        self, index: int, layer: LayerWeights, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
        plan: StepPlan, pool: KvPool,
    ) -> torch.Tensor:  # fmt: skip
        heads, kv_heads, dim = self._config.heads, self._config.kv_heads, self._config.head_dim
        dtype = layer.qkv.dtype
        qkv = F.linear(self._norm(hidden, layer.input_norm).to(dtype), layer.qkv, layer.qkv_bias)
        queries, keys, values = qkv.view(len(hidden), -1, dim).tensor_split((heads, heads + kv_heads), 1)
        if layer.q_norm is not None and layer.k_norm is not None:
            queries, keys = self._norm(queries, layer.q_norm), self._norm(keys, layer.k_norm)
        queries, keys = rope.rotate(queries, cos, sin).to(dtype), rope.rotate(keys, cos, sin).to(dtype)
        pool.write(index, plan.blocks, plan.offsets, torch.stack((keys, values), 1))
        found = attend(pool, index, plan, queries, keys, values)
        return F.linear(found.flatten(1), layer.output, layer.output_bias)

    def _mlp(self, layer: LayerWeights, hidden: torch.Tensor) -> torch.Tensor:
        normed = self._norm(hidden, layer.mlp_norm).to(layer.gate_up.dtype)
        gate, up = F.linear(normed, layer.gate_up).chunk(2, -1)
        return F.linear(F.silu(gate) * up, layer.down)

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """RMSNorm (arXiv 1910.07467) over the last dimension, in float32."""
        return F.rms_norm(x.float(), weight.shape, weight, self._config.rms_eps)
