"""Tiny random models, written by `transformers`, which is also the reference that logits are compared with."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from baton.engine.files.card import ModelDescription, describe
from baton.engine.files.models import EMBEDDED_MODEL, ResolvedModel, resolve
from baton.engine.native import build, library
from baton.engine.native.build import NativeUnavailable
from baton.engine.native.engine import NativeEngine
from baton.engine.processor import cpu_flags
from baton.engine.stepper import Stepper
from baton.engine.torch.engine import TorchEngine
from tests.reference import embedded_reference as reference_of_the_embedded_model

VOCABULARY = 300
CONTEXT = 512

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied-llama3": ("llama", {"tie_word_embeddings": True, "rope_parameters": LLAMA3}),
    "llama-bias-linear": ("llama", {"attention_bias": True, "rope_parameters": LINEAR}),
    "llama-yarn": ("llama", {"rope_parameters": YARN}),
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 24}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 24}),
}


@dataclass(frozen=True)
class Tiny:
    """A model on disk and the same one in `transformers`."""

    folder: Path
    reference: Any

    def logits(self, tokens: list[int]) -> torch.Tensor:
        """The reference's logits, [len(tokens), vocabulary]."""
        with torch.inference_mode():
            return self.reference(torch.tensor([tokens])).logits[0].float()  # type: ignore[no-any-return]

    def describe(self, dtype: str = "float32") -> ModelDescription:
        return describe(resolve(str(self.folder)), dtype)

    def engine(self, dtype: str = "float32", blocks: int = 64) -> TorchEngine:
        return TorchEngine.load(self.describe(dtype), blocks=blocks)


@dataclass(frozen=True)
class Computing:
    """One of the two implementations, and how far from the reference its arithmetic may be.

    `torch` is the path without a compiler, here in float32, which shows its mistakes; `native` computes in bf16.
    """

    kernels: str
    error: float
    """Root mean square of what logits may be off, in standard deviations of the reference's."""

    def engine(self, model: ResolvedModel | Tiny, blocks: int = 64, **options: Any) -> Stepper:
        """Options as for `load`."""
        resolved = resolve(str(model.folder)) if isinstance(model, Tiny) else model
        room = options if "buffer" in options else options | {"blocks": blocks}
        if self.kernels == "torch":
            return TorchEngine.load(describe(resolved, "float32"), **room)
        return NativeEngine.load(describe(resolved, "bfloat16"), **room)

    def assert_near(self, found: list[np.ndarray], reference: torch.Tensor, ends: list[int]) -> None:
        """Each row of logits is the reference's [tokens, vocabulary] after so many tokens."""
        for row, end in zip(found, ends, strict=True):
            expected = reference[end - 1].numpy()
            assert np.sqrt(np.mean((row - expected) ** 2)) <= self.error * expected.std(), f"after {end} tokens"


@pytest.fixture(scope="session")
def kernels() -> library.Library:
    """The kernels of this machine."""
    return kernels_without(set())


def kernels_without(lacking: set[str]) -> library.Library:
    """The kernels of a machine like this one whose processor lacks so many instructions; skips the test where there
    are none. From the user's own cache: tests do not compile them each time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("BATON_CACHE", raising=False)
        try:
            return library.load_for(build.target_for(cpu_flags() - lacking))
        except NativeUnavailable as error:
            pytest.skip(str(error))


@pytest.fixture(params=["torch", "native"])
def computing(request: pytest.FixtureRequest) -> Computing:
    """Both implementations in turn: what is right is right with either."""
    if request.param == "native":
        request.getfixturevalue("kernels")
    return Computing(request.param, {"torch": 1e-5, "native": 0.1}[request.param])


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache directory of the test's own, so that none leans on what another left."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("BATON_CACHE", str(folder))
    return folder


def write_tokenizer(folder: Path, bos: str | None = None) -> None:
    """A byte-level tokeniser without merges; with `bos`, one that puts it first."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(["<s>", "</s>"])
    if bos is not None:
        start = (bos, tokenizer.token_to_id(bos))
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[start])
    tokenizer.save(str(folder / "tokenizer.json"))


def make_tiny(folder: Path, architecture: str, shard: str = "1GB", **overrides: Any) -> Tiny:
    """Writes a random model of three layers; biases and norms are random too, so that none is a no-op."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers' own deprecations are no business of ours
        from transformers import AutoConfig, AutoModelForCausalLM

        shape = {
            "vocab_size": VOCABULARY,
            "hidden_size": 96,
            "intermediate_size": 128,
            "num_hidden_layers": 3,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": CONTEXT,
            "bos_token_id": 256,
            "eos_token_id": 257,
            "pad_token_id": None,
        }
        torch.manual_seed(7)
        config = AutoConfig.for_model(architecture, **(shape | overrides))
        reference = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        with torch.no_grad():
            for name, parameter in reference.named_parameters():
                parameter.normal_(1.0 if "norm" in name else 0.0, 0.1 if parameter.dim() == 1 else 0.2)
        reference.save_pretrained(folder, max_shard_size=shard)
    write_tokenizer(folder)
    return Tiny(folder, reference)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Tiny]:
    """A variant of VARIANTS by name; made once. Tests must not change its files."""
    made: dict[str, Tiny] = {}

    def get(name: str) -> Tiny:
        if name not in made:
            architecture, overrides = VARIANTS[name]
            made[name] = make_tiny(tmp_path_factory.mktemp(name), architecture, **overrides)
        return made[name]

    return get


@pytest.fixture(scope="session")
def embedded() -> Iterator[ResolvedModel]:
    """The embedded model, from the user's own cache: tests do not download it again each time."""
    before = os.environ.pop("BATON_CACHE", None)
    yield resolve(EMBEDDED_MODEL)
    if before is not None:
        os.environ["BATON_CACHE"] = before


@pytest.fixture(scope="session")
def embedded_reference(embedded: ResolvedModel) -> Any:
    """The embedded model in `transformers`, in float32."""
    return reference_of_the_embedded_model()


@pytest.fixture(scope="session")
def embedded_engine(embedded: ResolvedModel) -> TorchEngine:
    """The embedded model in float32, with 64 blocks. Tests must leave no expectation in its pool."""
    return TorchEngine.load(describe(embedded, "float32"), blocks=64)


def tokens_for(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed + 1)
    return torch.randint(0, VOCABULARY, (length,), generator=generator).tolist()
