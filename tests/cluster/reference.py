"""The independent reference: `transformers`, in float32, on the very same weights."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch

from baton.engine.models import EMBEDDED_MODEL, resolve

NEAR_TIE = 1e-4
"""Where the reference's two best logits lie closer than this, either may be the greedy choice."""


@cache
def _model() -> Any:
    path = resolve(EMBEDDED_MODEL).path
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers' own deprecations are no business of ours
        from transformers import AutoModelForCausalLM, GgufConfig

        model = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
        )
    return model.eval()


@cache
def _best_two(tokens: tuple[int, ...], prompt: int) -> tuple[torch.Tensor, torch.Tensor]:
    """For every position that predicts an output token: the two best logits and their ids, [outputs, 2] each."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with torch.inference_mode():
            hidden = _model().model(torch.tensor([tokens[:-1]])).last_hidden_state[0, prompt - 1 :]
            best = _model().lm_head(hidden).topk(2)
    finally:
        torch.set_num_threads(threads)
    return best.values, best.indices


def assert_greedy(prompt: Sequence[int], output: Sequence[int]) -> None:
    """Each output token is the reference's best one after all tokens before it (or tied with it).

    One pass over prompt and output shows the same as generating step by step: as long as every token agrees, the
    reference would have been fed just these.
    """
    tokens = (*prompt, *output)
    values, indices = _best_two(tokens, len(prompt))
    for step, token in enumerate(output):
        if int(indices[step, 0]) == token:
            continue
        gap = float(values[step, 0] - values[step, 1])
        assert int(indices[step, 1]) == token, f"token {step}: {token}, the reference has {indices[step].tolist()}"
        assert gap <= NEAR_TIE, f"token {step}: {token} is {gap:.2g} behind the reference's {int(indices[step, 0])}"
