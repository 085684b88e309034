"""`baton model info`: what a model takes, from its metadata alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from baton.cli.commands.model import parse_bytes
from baton.config import WeightChoice
from baton.engine.estimate import estimate
from baton.engine.files.card import describe
from baton.engine.files.models import EMBEDDED_MODEL, resolve
from baton.engine.native import library
from baton.engine.native.build import NativeUnavailable
from baton.engine.native.engine import NativeEngine
from baton.errors import ConfigError
from tests.cli.runner import baton


async def test_it_says_what_the_embedded_model_takes() -> None:
    result = await baton("model", "info", "--json", "--length", "1000", "--length", "17", "--pool-tokens", "32768")
    assert result.status == 0, result.err
    found = json.loads(result.out)
    assert found["parameters"] == 134_515_008
    assert found["kv_token_bytes"] == {"bfloat16": 23_040, "int8": 12_240, "float32": 46_080}
    assert found["weight_bytes"]["float32"] == 4 * 134_515_008
    assert found["pool"]["blocks"] == 2048
    assert found["sequences"] == [{"length": 1000, "fit": 32}, {"length": 17, "fit": 1024}]


async def test_memory_is_weights_overhead_and_pool() -> None:
    flags = ("--json", "--weights", "bf16", "--kv-dtype", "auto")
    whole = json.loads((await baton("model", "info", "--memory", "8GB", *flags)).out)
    room = 8e9 - whole["weight_bytes"]["bf16"] - 350e6
    block = whole["pool"]["bytes"] // whole["pool"]["blocks"]
    assert room - block < whole["pool"]["bytes"] <= room
    text = await baton("model", "info", "--pool", "512MiB")
    assert "134.5 million" in text.out
    assert "sequences fit" in text.out


async def test_it_reads_no_weights(tmp_path: Path) -> None:
    shape = {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4}
    shape |= {"intermediate_size": 96, "vocab_size": 100, "max_position_embeddings": 256}
    (tmp_path / "config.json").write_text(json.dumps(shape | {"rms_norm_eps": 1e-5}))
    result = await baton("model", "info", str(tmp_path), "--json")
    assert result.status == 0, result.err
    layer = 4 * 64 * 64 + 3 * 64 * 96 + 2 * 64
    assert json.loads(result.out)["parameters"] == 2 * 100 * 64 + 2 * layer + 64


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--length", "9000"), "length: 1 to 8192, the model's context, not 9000"),
        (("--memory", "1MB"), "memory: no room for one block"),
        (("--memory", "much"), "memory: a size such as 8GB, 512MiB or 1000000, not 'much'"),
        (("--memory", "8GB", "--pool-tokens", "5"), "pool-tokens, pool and memory: only one of them"),
    ],
)
async def test_what_makes_no_sense_is_refused_by_name(flags: tuple[str, ...], message: str) -> None:
    result = await baton("model", "info", *flags)
    assert result.status == 2
    assert message in result.error_line


def test_sizes() -> None:
    assert [parse_bytes("x", text) for text in ("8GB", "1.5 MiB", "77", "2kb")] == [8 * 10**9, 3 * 2**19, 77, 2000]
    with pytest.raises(ConfigError, match=r"^x: "):
        parse_bytes("x", "8 apples")


@pytest.mark.parametrize("weights", ["auto", "bf16", "int8", "int4"])
def test_the_estimate_is_what_the_engine_takes(weights: WeightChoice) -> None:
    try:
        kernels = library.load()
    except NativeUnavailable as error:
        pytest.skip(str(error))
    model = resolve(EMBEDDED_MODEL)
    engine = NativeEngine.load(describe(model, "bfloat16"), blocks=1, weights=weights, library=kernels)
    assert engine.weight_bytes == pytest.approx(estimate(model).weight_bytes[weights], rel=1e-3)


@pytest.mark.nightly
async def test_fetch_compiles_the_kernels_ahead(tmp_path: Path) -> None:
    """And prints nothing but the path, with which scripts go on; a second time there is nothing to do."""
    try:
        library.load()
    except NativeUnavailable as error:
        pytest.skip(str(error))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    for compiles in (True, False):
        result = await baton("model", "fetch", str(tmp_path / "model"), BATON_CACHE=str(tmp_path / "cache"))
        assert (result.status, result.out) == (0, f"{tmp_path / 'model'}\n")
        assert ("compiling the kernels, once" in result.err) is compiles
    assert len(list((tmp_path / "cache" / "native").glob("*.so"))) == 1
