"""A position's logits have the same bits however they are computed; and the mode that promises it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from baton.config import KvChoice, WeightChoice
from baton.engine.api import Sequence, Work
from baton.engine.files.card import computed_by, describe
from baton.engine.files.models import resolve
from baton.engine.load import load_engine
from baton.engine.native import build, library
from baton.engine.native.engine import NativeEngine
from baton.errors import ConfigError
from baton.identity import fingerprint_difference
from tests.engine.conftest import Tiny, make_tiny, tokens_for
from tests.engine.files.test_files import write_gguf
from tests.engine.torch.test_model import last_logits, sequence

FORMATS: list[tuple[WeightChoice, KvChoice]] = [
    (weights, kv) for weights in ("bf16", "int8", "int4", "auto") for kv in ("auto", "int8")
]
BATCHES = 25
"""Random batches for each of the 8 formats, so 200 in all."""
SIZES = (1, 2, 3, 5, 7, 12, 13, 16, 31, 64)
POOL = 1200
HEAD = 48
"""Tokens that every second sequence starts with: three blocks, computed by whichever comes first."""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model in floats, and the same on a grid of 4 bits."""
    shape: dict[str, Any] = {"head_dim": 64, "num_attention_heads": 3, "num_key_value_heads": 1, "num_hidden_layers": 2}
    model = make_tiny(tmp_path_factory.mktemp("floats"), "llama", **shape)
    quantised = tmp_path_factory.mktemp("grid") / "model.gguf"
    return model.folder, write_gguf(model, quantised, "llama", gguf.GGMLQuantizationType.Q4_1)


def engine_of(files: tuple[Path, Path], weights: WeightChoice, kv_dtype: KvChoice) -> NativeEngine:
    path = files[1] if weights == "auto" else files[0]
    description = describe(resolve(str(path)), "bfloat16", kv_dtype=kv_dtype)
    return NativeEngine.load(description, blocks=POOL, weights=weights)


@dataclass
class Batch:
    """Sequences under way together in blocks of their own; some start in blocks that another has computed."""

    running: list[Sequence]
    is_decode: list[bool]
    """Computed token by token from its first on."""

    def piece(self, at: int, rng: random.Random) -> int:
        """What the next step computes of one."""
        remaining = self.running[at].remaining
        if self.is_decode[at]:
            return 1
        return rng.choice((remaining, 1, rng.randint(1, remaining), max(1, remaining - 1)))


@pytest.mark.parametrize(("weights", "kv_dtype"), FORMATS)
def test_a_position_has_the_same_bits_however_it_is_computed(
    kernels: library.Library, files: tuple[Path, Path], weights: WeightChoice, kv_dtype: KvChoice
) -> None:
    """Batches of 1 to 64, cut anywhere, behind prefixes of other sequences, as prefill and token by token."""
    engine, rng = engine_of(files, weights, kv_dtype), random.Random(5)
    known = list(texts(rng))
    alone = [last_logits(engine, sequence(tokens, list(range(15))), [len(tokens)])[0] for tokens in known]
    for case in range(BATCHES):
        chosen = rng.sample(range(64), SIZES[case % len(SIZES)])
        batch = started(engine, [known[index] for index in chosen], rng)
        for at, logits in computed(engine, batch, rng):
            np.testing.assert_array_equal(logits, alone[chosen[at]])


def texts(rng: random.Random) -> Iterator[list[int]]:
    """Sixty-four, of lengths around the edges of blocks and of steps of attention."""
    for seed in range(64):
        head = tokens_for(HEAD, 99) if seed % 2 else []
        yield head + tokens_for(rng.choice((1, 15, 16, 17, 63, 64, 65, 100, 180)), seed)


def started(engine: NativeEngine, tokens: list[list[int]], rng: random.Random) -> Batch:
    """Those after the first that start with the common head find it in blocks that the first has computed."""
    free = rng.sample(range(POOL), 15 * len(tokens))
    running, shared = [], None
    for at, text in enumerate(tokens):
        blocks, cached = free[15 * at : 15 * at + 15], 0
        if text[:HEAD] == tokens_for(HEAD, 99):
            if shared is None:
                shared = blocks[:3]
                last_logits(engine, sequence(text[:HEAD], blocks), [HEAD - 5, 1, 4])
            blocks, cached = shared + blocks[3:], HEAD
        running.append(sequence(text, blocks, computed=cached))
    return Batch(running, [rng.random() < 0.25 for _ in tokens])


def computed(engine: NativeEngine, batch: Batch, rng: random.Random) -> Iterator[tuple[int, np.ndarray]]:
    """Runs all to their ends in steps of some of them; which one ended, with its last logits."""
    ready = list(range(len(batch.running)))
    while ready:
        active = rng.sample(ready, rng.randint((len(ready) + 1) // 2, len(ready)))
        works = [Work(batch.running[at], batch.piece(at, rng)) for at in active]
        ended = [at for at, work in zip(active, works, strict=True) if work.samples]
        logits = engine.logits(works)
        yield from zip(ended, [logits[place] for place in sorted(logits)], strict=True)
        ready = [at for at in ready if at not in ended]


def test_torch_cannot_promise_it(tiny: Callable[[str], Tiny], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = resolve(str(tiny("llama").folder))
    with pytest.raises(ConfigError, match=r"^deterministic: needs the native kernels; torch sums in another order"):
        load_engine(describe(folder, "bfloat16"), blocks=4, kernels="torch", deterministic=True)
    with pytest.raises(ConfigError, match=r"^deterministic: needs the native kernels, but the kernels keep KV in bf"):
        load_engine(describe(folder, "float32"), blocks=4, deterministic=True)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(library, "library_for", build.library_for.__wrapped__)
    with pytest.raises(ConfigError, match=r"^deterministic: needs the native kernels, but there is no C"):
        load_engine(describe(folder, "bfloat16"), blocks=4, deterministic=True)


def test_a_fingerprint_covers_what_decides_on_the_bits(kernels: library.Library, tiny: Callable[[str], Tiny]) -> None:
    engine = NativeEngine.load(tiny("llama").describe("bfloat16"), blocks=4)
    card = engine.description.card
    facts = {"weights": "bf16"} | engine.arithmetic
    ours = computed_by(card, facts).fingerprint
    assert facts["instructions"] == kernels.target.name
    assert ours.startswith(f"{card.fingerprint}/weights=bf16/kernels=native-")
    for name in facts:
        other = computed_by(card, facts | {name: "other"}).fingerprint
        assert fingerprint_difference(ours, other) == (name, facts[name], "other")
    assert fingerprint_difference(ours, card.fingerprint) == ("deterministic", "true", "false")
    assert fingerprint_difference(card.fingerprint, "ab") == ("fingerprint", card.fingerprint, "ab")
    shorter = computed_by(card, {"weights": "bf16"}).fingerprint
    assert fingerprint_difference(ours, shorter) == ("fingerprint", ours, shorter)


def test_the_packed_weights_decide(kernels: library.Library, files: tuple[Path, Path]) -> None:
    """Calibrated twice they are the same bits; in another format they are not."""
    first, again, other = (engine_of(files, weights, "auto").arithmetic for weights in ("int4", "int4", "int8"))
    assert first == again
    assert first["packed"] != other["packed"]
    assert first | {"packed": ""} == other | {"packed": ""}


def test_the_kernels_sources_decide(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    target = build.BuildTarget("avx2", ())
    before = build.arithmetic_of(target)
    (tmp_path / "step.cpp").write_text("// another version")
    monkeypatch.setattr(build, "SOURCES", tmp_path)
    assert build.arithmetic_of(target)["kernels"] != before["kernels"]
