"""The independent reference: `transformers`, in float32, on the very same weights."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch

from baton.engine.files.models import EMBEDDED_MODEL, resolve

NEAR_TIE = 1e-4
"""Tokens whose logits in the reference lie closer than this may each be the greedy choice of a float32 engine."""
NEAR_IN_BF16 = 0.25
"""The same for one that computes in bf16: some times what that moves a logit of the embedded model (0.05)."""


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
def _gaps(tokens: tuple[int, ...], prompt: int) -> torch.Tensor:
    """For every output token: how far its logit is behind the best one, [outputs]."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with torch.inference_mode():
            hidden = _model().model(torch.tensor([tokens[:-1]])).last_hidden_state[0, prompt - 1 :]
            logits = _model().lm_head(hidden)
    finally:
        torch.set_num_threads(threads)
    given = logits.gather(1, torch.tensor(tokens[prompt:])[:, None])[:, 0]
    gaps: torch.Tensor = logits.amax(1) - given
    return gaps


def assert_greedy(prompt: Sequence[int], output: Sequence[int], near: float = NEAR_TIE) -> None:
    """Each output token is the reference's best one after all tokens before it, or as near to it as `near`.

    One pass over prompt and output shows the same as generating step by step: as long as every token agrees, the
    reference would have been fed just these.
    """
    for step, gap in enumerate(_gaps((*prompt, *output), len(prompt)).tolist()):
        assert gap <= near, f"token {step}: {output[step]} is {gap:.2g} behind the reference's best"
