"""The embedded model as a checkpoint in floats on no 4-bit grid, with the same function.

The dimensions of the residual stream, of each MLP and of each head's values are permuted, everywhere alike, which
changes only the order of sums. But a group of 32 inputs on one grid becomes 32 inputs of as many groups, so that
quantising is a fresh choice, as for weights that never were on a grid.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

LAYER = "model.layers.{}."
READ = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
"""The matrices that read the residual stream; a layer's other matrices write to it."""


def write_shuffled(reference: Any, tokenizer_json: bytes, folder: Path, seed: int = 1) -> None:
    """Writes `reference`, a Llama without biases, to `folder` as Hugging Face lays it out, in float32."""
    weights = {name: tensor.clone() for name, tensor in reference.state_dict().items() if name != "lm_head.weight"}
    config = reference.config
    random = torch.Generator().manual_seed(seed)
    residual = torch.randperm(config.hidden_size, generator=random)
    _shuffle(weights, ["model.embed_tokens.weight"], 1, residual)
    _shuffle(weights, ["model.norm.weight"], 0, residual)
    for layer in range(config.num_hidden_layers):
        prefix = LAYER.format(layer)
        inner = torch.randperm(config.intermediate_size, generator=random)
        values, outputs = _value_orders(config, random)
        _shuffle(weights, [f"{prefix}{name}.weight" for name in READ], 1, residual)
        _shuffle(weights, [f"{prefix}{name}.weight" for name in ("self_attn.o_proj", "mlp.down_proj")], 0, residual)
        _shuffle(weights, [f"{prefix}{name}_layernorm.weight" for name in ("input", "post_attention")], 0, residual)
        _shuffle(weights, [f"{prefix}mlp.gate_proj.weight", f"{prefix}mlp.up_proj.weight"], 0, inner)
        _shuffle(weights, [f"{prefix}mlp.down_proj.weight"], 1, inner)
        _shuffle(weights, [f"{prefix}self_attn.v_proj.weight"], 0, values)
        _shuffle(weights, [f"{prefix}self_attn.o_proj.weight"], 1, outputs)
    save_file(weights, folder / "model.safetensors")
    settings = {name: value for name, value in config.to_dict().items() if name != "quantization_config"}
    (folder / "config.json").write_text(json.dumps(settings | {"tie_word_embeddings": True}))
    (folder / "tokenizer.json").write_bytes(tokenizer_json)


def _shuffle(weights: dict[str, torch.Tensor], names: list[str], dim: int, order: torch.Tensor) -> None:
    for name in names:
        weights[name] = weights[name].index_select(dim, order).contiguous()


def _value_orders(config: Any, random: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Orders of all value dimensions, and of the output projection's inputs: each head as its values' head."""
    dim = config.hidden_size // config.num_attention_heads
    heads = [torch.randperm(dim, generator=random) for _ in range(config.num_key_value_heads)]
    shared = config.num_attention_heads // config.num_key_value_heads
    values = torch.cat([head * dim + order for head, order in enumerate(heads)])
    outputs = torch.cat([head * dim + heads[head // shared] for head in range(config.num_attention_heads)])
    return values, outputs
