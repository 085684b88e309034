"""`baton model`: models on this machine."""

from __future__ import annotations

import contextlib
import re
from typing import Annotated, Any

from cyclopts import App, Parameter

from baton.cli.flags import Json
from baton.cli.output import print_json, print_table
from baton.config import DEFAULT_MODEL, KvChoice, WeightChoice, WorkerSettings
from baton.errors import ConfigError
from baton.model import KvLayout
from baton.telemetry import configure_logs

app = App(name="model", help="Manage the models on this machine.")
SHAPE = ("architecture", "layers", "hidden", "heads", "kv_heads", "head_dim")
LENGTHS = (128, 1024, 8192)
OVERHEAD_BYTES = 350_000_000
"""The most that a worker takes beside weights and pool."""
_UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


@app.command
def fetch(name: str = DEFAULT_MODEL, /) -> None:
    """Fetch a model and compile the kernels, so that workers start without waiting; prints where the model lies.

    Parameters
    ----------
    name
        A built-in name, a path, or a hub name.
    """
    from baton.engine.files.models import resolve
    from baton.engine.native.build import NativeUnavailable, library_for, target_for
    from baton.engine.processor import cpu_flags

    path = resolve(name).path
    configure_logs("model")
    with contextlib.suppress(NativeUnavailable):  # workers say so, and compute with torch
        library_for(target_for(cpu_flags()))
    print(path)


@app.command
def info(
    name: str = DEFAULT_MODEL,
    /,
    *,
    length: Annotated[list[int] | None, Parameter(help="Tokens of a sequence, output included; repeatable.")] = None,
    pool_tokens: Annotated[int | None, Parameter(help="A pool of so many tokens. Default: a worker's.")] = None,
    pool: Annotated[str | None, Parameter(help="A pool of so many bytes, as in 2GB or 512MiB.")] = None,
    memory: Annotated[str | None, Parameter(help="Memory of the whole worker, as in 8GB.")] = None,
    weights: Annotated[WeightChoice, Parameter(help="The format that --memory reckons with.")] = "auto",
    kv_dtype: Annotated[KvChoice, Parameter(help="The pool's format: int8, or auto as workers resolve it.")] = "auto",
    json: Json = False,
) -> None:
    """Show what a model takes: parameters, weights by format, KV by format, and how many sequences fit.

    Reads the metadata alone.

    Parameters
    ----------
    name
        A built-in name, a path, or a hub name.
    """
    from baton.engine.estimate import KV_DTYPES, estimate
    from baton.engine.files.card import resolve_dtype, resolve_kv_dtype
    from baton.engine.files.models import resolve

    model = resolve(name)
    found = estimate(model)
    config = found.config
    layout = found.layout(resolve_kv_dtype(kv_dtype, resolve_dtype("auto", "cpu")))
    blocks = _blocks(layout, pool_tokens, pool, memory, found.weight_bytes[weights])
    lengths = length or [each for each in LENGTHS if each <= config.context_tokens]
    for each in lengths:
        if not 1 <= each <= config.context_tokens:
            raise ConfigError(f"length: 1 to {config.context_tokens}, the model's context, not {each}")
    facts: dict[str, Any] = {
        "model": model.name,
        "path": str(model.path),
        **{name: getattr(config, name) for name in SHAPE},
        "vocabulary_size": config.vocabulary,
        "context_tokens": config.context_tokens,
        "parameters": found.parameters,
        "weight_bytes": found.weight_bytes,
        "kv_token_bytes": {dtype: found.layout(dtype).token_bytes for dtype in KV_DTYPES},
        "pool": {
            "kv_dtype": layout.dtype,
            "blocks": blocks,
            "tokens": blocks * layout.block_tokens,
            "bytes": blocks * layout.block_bytes,
        },
        "sequences": [{"length": each, "fit": blocks // layout.blocks_for(each)} for each in lengths],
    }
    if json:
        print_json(facts)
    else:
        _show(facts)


def _blocks(layout: KvLayout, tokens: int | None, pool: str | None, memory: str | None, weight_bytes: int) -> int:
    """Blocks of the pool that the options describe. Raises ConfigError for no block, and for several options."""
    if sum(option is not None for option in (tokens, pool, memory)) > 1:
        raise ConfigError("pool-tokens, pool and memory: only one of them")
    if pool is None and memory is None:
        tokens = WorkerSettings.pool_tokens if tokens is None else tokens
        if tokens < 1:
            raise ConfigError(f"pool-tokens: at least 1, not {tokens}")
        return layout.blocks_for(tokens)
    if pool is not None:
        field, room = "pool", parse_bytes("pool", pool)
    else:
        field, room = "memory", parse_bytes("memory", memory or "") - weight_bytes - OVERHEAD_BYTES
    if room < layout.block_bytes:
        raise ConfigError(f"{field}: no room for one block of {layout.block_bytes} bytes")
    return room // layout.block_bytes


def parse_bytes(field: str, text: str) -> int:
    """`8GB` (decimal), `512MiB` (binary) or plain bytes. Raises ConfigError with the field's name."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip().lower())
    if match is None or match[2] not in _UNITS:
        raise ConfigError(f"{field}: a size such as 8GB, 512MiB or 1000000, not {text!r}")
    return int(float(match[1]) * _UNITS[match[2]])


def _show(facts: dict[str, Any]) -> None:
    shape = "{layers} layers, hidden {hidden}, {heads} heads, {kv_heads} KV heads of {head_dim}".format(**facts)
    pool = "{tokens} tokens, {blocks} blocks in {kv_dtype}".format(**facts["pool"])
    rows = [
        ["model", facts["model"]],
        ["architecture", f"{facts['architecture']}: {shape}"],
        ["context", f"{facts['context_tokens']} tokens"],
        ["parameters", f"{facts['parameters'] / 1e6:.1f} million"],
    ]
    rows += [[f"weights {name}", f"{size / 1e6:.1f} MB"] for name, size in facts["weight_bytes"].items()]
    rows += [[f"KV {name}", f"{size} bytes a token"] for name, size in facts["kv_token_bytes"].items()]
    rows.append(["pool", f"{facts['pool']['bytes'] / 1e6:.1f} MB: {pool}"])
    rows += [[f"of {each['length']} tokens", f"{each['fit']} sequences fit"] for each in facts["sequences"]]
    print_table(("what", "value"), rows)
