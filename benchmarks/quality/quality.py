"""The quality of each weight and KV format: `make bench-quality`, or python -m benchmarks.quality.quality.

Against `transformers` in float32, along its greedy continuations of a hundred prompts: mean KL divergence of the next
token's distribution, and the share of continuations that greedy decoding would reproduce exactly. Then the cost of
deterministic mode in time.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from baton.config import KvChoice, WeightChoice
from baton.engine.files.card import ModelDescription, describe
from baton.engine.files.models import EMBEDDED_MODEL, ResolvedModel, resolve
from baton.engine.native.engine import NativeEngine
from baton.engine.stepper import Stepper
from baton.engine.torch.engine import TorchEngine
from benchmarks.quality import determinism, fidelity, prompts, shuffled
from benchmarks.quality.fidelity import Continuation, Fidelity
from benchmarks.report import Row, publish, spread

OUTPUTS = 64
REFERENCE = "float32 transformers"
BOUNDS = {"float32": 1e-6, "bf16": 1e-3, "auto": 5e-3, "int8": 5e-3, "int4": 2e-2}
"""On mean KL, by format. `auto` keeps the file's 4-bit grid exactly, but its kernels round activations to 8 bits."""
KV_BOUND = 2e-3
"""The increase that 8-bit KV may cause."""


@dataclass(frozen=True, slots=True)
class QualityCase:
    """One engine and its formats. `is_shuffled` selects the checkpoint in floats."""

    name: str
    weights: WeightChoice
    kv_dtype: KvChoice = "auto"
    dtype: str = "bfloat16"
    is_torch: bool = False
    is_shuffled: bool = False

    @property
    def bound(self) -> float:
        form = "float32" if self.dtype == "float32" else self.weights
        return BOUNDS[form] + (KV_BOUND if self.kv_dtype == "int8" else 0.0)

    @property
    def label(self) -> str:
        return self.name if self.is_torch else f"{self.name}; {'8-bit' if self.kv_dtype == 'int8' else 'bf16'} KV"


NATIVE = (
    QualityCase("bf16", "bf16"),
    QualityCase("own 4-bit grid, 8-bit activations", "auto"),
    QualityCase("int8", "int8"),
    QualityCase("int4, from floats", "int4", is_shuffled=True),
)
CASES = (
    QualityCase("torch float32", "auto", dtype="float32", is_torch=True),
    QualityCase("torch bf16", "bf16", is_torch=True),
    *NATIVE,
    *(QualityCase(case.name, case.weights, "int8", is_shuffled=case.is_shuffled) for case in NATIVE),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=100, help="the number of prompts, spread over all kinds")
    options = parser.parse_args()
    model = resolve(EMBEDDED_MODEL)
    with tempfile.TemporaryDirectory() as folder:
        wanted = reference(model, options.prompts, Path(folder))
        rows = [row for case in CASES for row in rows_of(case, measured(case, model, Path(folder), wanted))]
    rows += determinism.rows()
    sys.exit(not publish("quality", rows))


def reference(model: ResolvedModel, count: int, folder: Path) -> list[Continuation]:
    """Greedy continuations of `count` prompts; also writes the checkpoint in floats to `folder`."""
    tokenizer_json = describe(model).card.tokenizer_json
    known = prompts.read(tokenizer_json)
    started, found = time.monotonic(), fidelity.reference_model(model)
    shuffled.write_shuffled(found, tokenizer_json, folder)
    wanted = fidelity.continuations(found, known[:: max(1, len(known) // count)][:count], OUTPUTS)
    print(f"{REFERENCE}: {len(wanted)} continuations in {time.monotonic() - started:.0f} s", flush=True)
    return wanted


def engine_for(case: QualityCase, model: ResolvedModel, folder: Path, wanted: Sequence[Continuation]) -> Stepper:
    """The engine of a case, with a pool for all continuations."""
    found = resolve(str(folder)) if case.is_shuffled else model
    description: ModelDescription = describe(found, case.dtype, kv_dtype=case.kv_dtype)
    blocks = fidelity.blocks_needed(wanted, description.card.kv_layout.block_tokens)
    if case.is_torch:
        return TorchEngine.load(description, blocks=blocks)
    return NativeEngine.load(description, blocks=blocks, weights=case.weights)


def measured(case: QualityCase, model: ResolvedModel, folder: Path, wanted: Sequence[Continuation]) -> list[Fidelity]:
    found = fidelity.measure(engine_for(case, model, folder, wanted), wanted)
    print(f"{case.label}: mean KL {fidelity.mean_divergence(found):.2e}", flush=True)
    return found


def rows_of(case: QualityCase, found: Sequence[Fidelity]) -> list[Row]:
    """Mean KL against its bound, and the share of identical continuations."""
    divergence, share = fidelity.mean_divergence(found), sum(one.identical for one in found) / len(found)
    of_prompts = spread([float(one.divergence.mean()) for one in found])
    target, met = f"at most {case.bound:g}", divergence <= case.bound
    return [
        Row(f"{case.label}: mean KL", "nats", divergence, "bound", case.bound, False, target, met, of_prompts),
        Row(f"{case.label}: identical", "of 1", share, REFERENCE, 1.0, True),
    ]


if __name__ == "__main__":
    torch.set_num_threads(2)
    main()
