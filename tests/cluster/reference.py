"""Whether what a cluster answers is what the reference would have."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch

from tests.reference import embedded_reference

NEAR_TIE = 1e-4
"""Tokens whose logits in the reference lie closer than this may each be the greedy choice of a float32 engine."""
NEAR_IN_BF16 = 0.25
"""The same for one that computes in bf16: some times what that moves a logit of the embedded model (0.05)."""

Tokens = tuple[int, ...]
_known: defaultdict[Tokens, dict[Tokens, torch.Tensor]] = defaultdict(dict)
"""By prompt and output. A shorter output that begins like a known one has its first gaps: no token sees a later one."""


def _gaps(prompt: Tokens, output: Tokens) -> torch.Tensor:
    """For every output token: how far its logit is behind the best one, [outputs]."""
    for longer, gaps in _known[prompt].items():
        if longer[: len(output)] == output:
            return gaps[: len(output)]
    _known[prompt][output] = _computed(prompt, output)
    return _known[prompt][output]


def _computed(prompt: Tokens, output: Tokens) -> torch.Tensor:
    model, threads = embedded_reference(), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with torch.inference_mode():
            tokens = torch.tensor([(*prompt, *output[:-1])])
            logits = model.lm_head(model.model(tokens).last_hidden_state[0, len(prompt) - 1 :])
    finally:
        torch.set_num_threads(threads)
    given = logits.gather(1, torch.tensor(output)[:, None])[:, 0]
    gaps: torch.Tensor = logits.amax(1) - given
    return gaps


def assert_greedy(prompt: Sequence[int], output: Sequence[int], near: float = NEAR_TIE) -> None:
    """Each output token is the reference's best one after all tokens before it, or as near to it as `near`.

    One pass over prompt and output shows the same as generating step by step: as long as every token agrees, the
    reference would have been fed just these. Of several outputs to one prompt, check the longest first.
    """
    for step, gap in enumerate(_gaps(tuple(prompt), tuple(output)).tolist()):
        assert gap <= near, f"token {step}: {output[step]} is {gap:.2g} behind the reference's best"
