"""Each weight and KV format keeps within its bound on mean KL divergence, over a handful of the benchmark's prompts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from baton.engine.files.card import describe
from baton.engine.files.models import ResolvedModel
from baton.engine.native import library
from benchmarks.quality import fidelity, prompts, quality, shuffled
from benchmarks.quality.fidelity import Continuation

OUTPUTS = 24
EVERY = 17
"""Of the benchmark's hundred prompts, one in so many."""

CASES = [
    pytest.param(case, id=case.label, marks=() if case.name.startswith("own") else pytest.mark.nightly)
    for case in quality.CASES
]
"""Every run has the weights that workers use unless told otherwise; the other formats are for the night."""


@pytest.fixture(scope="module")
def floats(embedded: ResolvedModel, embedded_reference: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model as a checkpoint in floats, off its grid."""
    folder = tmp_path_factory.mktemp("floats")
    shuffled.write_shuffled(embedded_reference, describe(embedded).card.tokenizer_json, folder)
    return folder


@pytest.fixture(scope="module")
def wanted(embedded: ResolvedModel, embedded_reference: Any) -> list[Continuation]:
    known = prompts.read(describe(embedded).card.tokenizer_json)
    return fidelity.continuations(embedded_reference, known[::EVERY], OUTPUTS)


@pytest.mark.parametrize("case", CASES)
def test_a_format_keeps_its_bound(
    kernels: library.Library,
    embedded: ResolvedModel,
    floats: Path,
    wanted: Sequence[Continuation],
    case: quality.QualityCase,
) -> None:
    found = fidelity.measure(quality.engine_for(case, embedded, floats, wanted), wanted)
    assert fidelity.mean_divergence(found) < case.bound


def test_the_checkpoint_in_floats_is_the_same_model(
    embedded: ResolvedModel, floats: Path, wanted: Sequence[Continuation]
) -> None:
    exact = quality.QualityCase("", "auto", dtype="float32", is_torch=True, is_shuffled=True)
    (found,) = fidelity.measure(quality.engine_for(exact, embedded, floats, wanted[:1]), wanted[:1])
    assert float(found.divergence.max()) < 1e-6
    assert found.identical


def test_divergence_is_that_of_the_definition() -> None:
    one = Continuation((1,), (1,), torch.tensor([[0.0, 1.0, 0.0]]))
    p, q = one.logits.softmax(-1), torch.tensor([[2.0, 1.0, 0.0]]).softmax(-1)
    found = fidelity.compare(one, torch.tensor([[2.0, 1.0, 0.0]]))
    assert float(found.divergence) == pytest.approx(float((p * (p / q).log()).sum()))
    assert not found.identical


def test_the_prompts_are_a_hundred_and_varied(embedded: ResolvedModel) -> None:
    card = describe(embedded).card
    known = prompts.read(card.tokenizer_json)
    lengths = [len(prompt.tokens) for prompt in known]
    assert len(known) == len({prompt.tokens for prompt in known}) == 100
    assert min(lengths) < 5
    assert max(lengths) > 300
    assert len({prompt.kind for prompt in known}) >= 18
    chat = next(prompt for prompt in known if prompt.kind == "chat")
    assert Tokenizer.from_str(card.tokenizer_json.decode()).decode(chat.tokens, skip_special_tokens=False) == (
        prompts.CHAT.format("What is the capital of France?")
    )
