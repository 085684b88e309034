"""How much each input of a matrix matters when its weights are rounded to 4 bits, measured with a fixed text.

The error of a rounded weight reaches the output times its input, so that squared errors are weighed by the input's
mean square over the text. Runs layer by layer and holds one layer's matrices at a time.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

from baton.engine.files.config import ModelConfig
from baton.engine.files.tensors import TensorSource
from baton.engine.native.library import Slot
from baton.engine.torch import rope

TEXT = Path(__file__).with_name("calibration.txt")
"""Our own prose, dialogue, code, tables and sums in thirteen languages."""
SEQUENCES, TOKENS = 16, 64


class Calibration:
    """Runs the text through the model in float32, matrix by matrix, in the order of `Slot`, layer after layer."""

    def __init__(self, source: TensorSource, config: ModelConfig, tokenizer_json: bytes) -> None:
        self._source, self._config = source, config
        tokens = text_tokens(tokenizer_json).clamp(max=config.vocabulary - 1)
        embedding = source.read("model.embed_tokens.weight", (config.vocabulary, config.hidden))
        self._hidden = embedding[tokens].float()
        inverse, scaling = rope.frequencies(config)
        self._cos, self._sin = rope.tables(inverse, scaling, torch.arange(tokens.shape[1]))
        self._gate = torch.empty(0)
        self._inputs = self._normed(0, "input_layernorm")

    def importance(self) -> npt.NDArray[np.float32]:
        """The mean square of each input of the next matrix, [columns]."""
        squares: npt.NDArray[np.float32] = self._inputs.square().mean((0, 1)).numpy()
        return squares

    def advance(self, layer: int, slot: Slot, parts: list[tuple[str, int]], columns: int) -> None:
        """Applies a matrix, given as named tensors with the rows of each, one above the other."""
        weights = [self._source.read(name, (rows, columns)).float() for name, rows in parts]
        found = torch.cat([F.linear(self._inputs, part) for part in weights], -1)
        match slot:
            case Slot.QKV:
                self._inputs = self._attended(layer, found)
            case Slot.OUTPUT:
                self._hidden += self._biased(layer, found, "o_proj") if self._config.output_bias else found
                self._inputs = self._normed(layer, "post_attention_layernorm")
            case Slot.GATE:
                self._gate = F.silu(found)
            case Slot.UP:
                self._inputs = self._gate * found
            case Slot.DOWN:
                self._hidden += found
                if layer + 1 < self._config.layers:
                    self._inputs = self._normed(layer + 1, "input_layernorm")

    def _attended(self, layer: int, qkv: torch.Tensor) -> torch.Tensor:
        config = self._config
        heads = (config.heads, config.kv_heads, config.kv_heads)
        parts = list(torch.split(qkv, [count * config.head_dim for count in heads], -1))
        if config.attention_bias:
            parts = [self._biased(layer, part, f"{name}_proj") for part, name in zip(parts, "qkv", strict=True)]
        queries, keys, values = (part.reshape(*part.shape[:2], -1, config.head_dim) for part in parts)
        if config.qk_norm:
            queries, keys = self._head_normed(layer, queries, "q_norm"), self._head_normed(layer, keys, "k_norm")
        queries, keys = rope.rotate(queries, self._cos, self._sin), rope.rotate(keys, self._cos, self._sin)
        queries, keys, values = (each.transpose(1, 2) for each in (queries, keys, values))
        found = F.scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=True)
        return found.transpose(1, 2).flatten(2)

    def _vector(self, layer: int, name: str, size: int) -> torch.Tensor:
        return self._source.read(f"model.layers.{layer}.{name}", (size,)).float()

    def _biased(self, layer: int, x: torch.Tensor, name: str) -> torch.Tensor:
        return x + self._vector(layer, f"self_attn.{name}.bias", x.shape[-1])

    def _normed(self, layer: int, name: str) -> torch.Tensor:
        weight = self._vector(layer, f"{name}.weight", self._config.hidden)
        return F.rms_norm(self._hidden, weight.shape, weight, self._config.rms_eps)

    def _head_normed(self, layer: int, heads: torch.Tensor, name: str) -> torch.Tensor:
        weight = self._vector(layer, f"self_attn.{name}.weight", self._config.head_dim)
        return F.rms_norm(heads, weight.shape, weight, self._config.rms_eps)


def text_tokens(tokenizer_json: bytes) -> torch.Tensor:
    """Token ids of pieces evenly spread over the text, [SEQUENCES, TOKENS]."""
    tokenizer = Tokenizer.from_str(tokenizer_json.decode())
    parts = TEXT.read_text(encoding="utf-8").split("%%\n")
    known = [token for part in parts for token in tokenizer.encode(part, add_special_tokens=False).ids]
    known *= -(-SEQUENCES * TOKENS // max(1, len(known)))
    starts = [(len(known) - TOKENS) * index // (SEQUENCES - 1) for index in range(SEQUENCES)]
    return torch.tensor([known[start : start + TOKENS] for start in starts])
