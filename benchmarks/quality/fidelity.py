"""Compares an engine's next-token distributions with a reference's, along the reference's greedy continuations."""

from __future__ import annotations

import warnings
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any

import torch

from baton.engine.api import Sequence, Work
from baton.engine.files.models import ResolvedModel
from baton.engine.stepper import Stepper
from baton.spec import Sampling
from benchmarks.quality.prompts import QualityPrompt

GREEDY = Sampling(temperature=0.0)
AT_ONCE = 10
"""Sequences in a batch, in the reference and in the engines."""


@dataclass(frozen=True, slots=True)
class Continuation:
    """A prompt, the reference's greedy `output`, and its logits [outputs, vocabulary] at each token of that."""

    prompt: tuple[int, ...]
    output: tuple[int, ...]
    logits: torch.Tensor


@dataclass(frozen=True, slots=True)
class Fidelity:
    """An engine against one continuation: KL(reference || engine) per position, and whether all best tokens agree, in
    which case greedy decoding gives the same text."""

    divergence: torch.Tensor
    identical: bool


def reference_model(model: ResolvedModel) -> Any:
    """The model in `transformers`, in float32, from the same files."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers' own deprecations
        from transformers import AutoModelForCausalLM, GgufConfig

        found = AutoModelForCausalLM.from_pretrained(
            model.path.parent,
            gguf_file=model.path.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
        )
    return found.eval()


@torch.inference_mode()
def continuations(reference: Any, prompts: Seq[QualityPrompt], outputs: int) -> list[Continuation]:
    """Continues each prompt with `outputs` greedy tokens, past any end of text."""
    found: list[Continuation] = []
    for start in range(0, len(prompts), AT_ONCE):
        group = [prompt.tokens for prompt in prompts[start : start + AT_ONCE]]
        for prompt, output in zip(group, _continue(reference, group, outputs), strict=True):
            # The logits to compare with come from one pass without padding.
            hidden = reference.model(torch.tensor([(*prompt, *output[:-1])])).last_hidden_state[0, len(prompt) - 1 :]
            logits = reference.lm_head(hidden)
            found.append(Continuation(prompt, tuple(output), logits))
    return found


def _continue(reference: Any, group: list[tuple[int, ...]], outputs: int) -> list[list[int]]:
    """Greedy tokens of prompts, padded on the left."""
    longest = max(map(len, group))
    tokens = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in group])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in group])
    drawn: list[torch.Tensor] = []
    cache = None
    for _ in range(outputs):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        found = reference(
            tokens, attention_mask=mask, position_ids=positions, past_key_values=cache, logits_to_keep=1, use_cache=True
        )
        cache, tokens = found.past_key_values, found.logits[:, -1].argmax(-1, keepdim=True)
        mask = torch.cat((mask, torch.ones_like(tokens)), 1)
        drawn.append(tokens)
    columns: list[list[int]] = torch.cat(drawn, 1).tolist()
    return columns


def measure(engine: Stepper, wanted: Seq[Continuation]) -> list[Fidelity]:
    """Prefills each prompt and decodes the reference's output token by token, `AT_ONCE` sequences in a step."""
    found: list[Fidelity] = []
    for start in range(0, len(wanted), AT_ONCE):
        found += _measure_group(engine, wanted[start : start + AT_ONCE])
    return found


def _measure_group(engine: Stepper, group: Seq[Continuation]) -> list[Fidelity]:
    running, used = [], 0
    for one in group:
        held = engine.layout.blocks_for(len(one.prompt) + len(one.output))
        running.append(
            Sequence(bytes(16), list(one.prompt), len(one.prompt), list(range(used, used + held)), 0, GREEDY)
        )
        used += held
    rows = [[torch.from_numpy(engine.logits([Work(sequence, sequence.remaining)])[0])] for sequence in running]
    for at in range(len(group[0].output) - 1):
        for one, sequence in zip(group, running, strict=True):
            sequence.tokens.append(one.output[at])
        logits = engine.logits([Work(sequence, 1) for sequence in running])
        for index, row in enumerate(rows):
            row.append(torch.from_numpy(logits[index]))
    return [compare(one, torch.stack(row)) for one, row in zip(group, rows, strict=True)]


def compare(one: Continuation, logits: torch.Tensor) -> Fidelity:
    """`logits` [outputs, vocabulary] against the reference's, in float64."""
    p, q = one.logits.double().log_softmax(-1), logits.double().log_softmax(-1)
    return Fidelity((p.exp() * (p - q)).sum(-1), bool((logits.argmax(-1) == torch.tensor(one.output)).all()))


def mean_divergence(found: Seq[Fidelity]) -> float:
    """Mean KL over all positions of all continuations."""
    return float(torch.cat([one.divergence for one in found]).mean())


def blocks_needed(wanted: Seq[Continuation], block_tokens: int) -> int:
    """Blocks for any group of `AT_ONCE` sequences."""
    longest = max(len(one.prompt) + len(one.output) for one in wanted)
    return AT_ONCE * (longest // block_tokens + 1)
