"""What a GGUF file calls the tensors of a Hugging Face checkpoint."""

from __future__ import annotations

import re

_GGUF_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_GGUFLAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
LAYER_NAME = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")


def gguf_name(name: str) -> str:
    """What a GGUF file calls the tensor that a Hugging Face checkpoint calls `name`."""
    match = LAYER_NAME.fullmatch(name)
    if match is None:
        return _GGUF_NAMES[name]
    layer, module, kind = match.groups()
    return f"blk.{layer}.{_GGUFLAYER_NAMES[module]}.{kind}"
