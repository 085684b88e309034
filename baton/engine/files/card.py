"""A model's card, for the router and other workers: shape of its KV, tokeniser, chat template, ids that end a text.

Reading it needs no torch and is cheap: weights are only checksummed, and that is cached.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from tokenizers import Tokenizer

from baton.engine.files import tokenizer
from baton.engine.files.config import ModelConfig, from_gguf, from_hf
from baton.engine.files.digests import weights_digest
from baton.engine.files.gguf_file import GgufFile
from baton.engine.files.metadata import Metadata, read_json
from baton.engine.files.models import ResolvedModel
from baton.engine.processor import cpu_flags
from baton.errors import ConfigError, ModelFileError
from baton.identity import extended_fingerprint
from baton.model import KvLayout, ModelCard

DTYPES = ("float32", "bfloat16", "float16")
_BF16_INSTRUCTIONS = frozenset({"avx512_bf16", "amx_bf16"})


@dataclass(frozen=True, slots=True)
class LocalCard(ModelCard):
    """A card with the files that its checksums are of. `chat_template` is Jinja, empty where the model has none."""

    tokenizer_json: bytes = b""
    chat_template: str = ""

    @property
    def artifacts(self) -> dict[str, bytes]:
        """What routers fetch, by SHA-256."""
        files = {self.tokenizer_sha256: self.tokenizer_json, self.chat_template_sha256: self.chat_template.encode()}
        return {checksum: data for checksum, data in files.items() if data}


@dataclass(frozen=True, slots=True)
class ModelDescription:
    """A model without its weights."""

    model: ResolvedModel
    config: ModelConfig
    card: LocalCard


def describe(
    model: ResolvedModel, dtype: str = "auto", device: str = "cpu", kv_dtype: str = "auto"
) -> ModelDescription:
    """Reads shape and card; `dtype` is of weights and arithmetic, `kv_dtype` as for `resolve_kv_dtype`. Raises
    ModelFileError for a file that is missing, damaged or of an unknown kind, ConfigError for an unknown dtype."""
    if model.is_gguf:
        file = GgufFile(model.path)
        config, text = from_gguf(file), _text_of_gguf(file.metadata)
    else:
        settings = read_json(model.path / "config.json")
        config, text = from_hf(settings), _text_of_folder(model, settings)
    kept = resolve_kv_dtype(kv_dtype, resolve_dtype(dtype, device))
    layout = KvLayout(config.layers, config.kv_heads, config.head_dim, kept)
    card = LocalCard(
        name=model.name,
        fingerprint=fingerprint(weights_digest(model.weight_files()), config, layout),
        context_tokens=config.context_tokens,
        vocabulary_size=config.vocabulary,
        kv_layout=layout,
        **text,
        tokenizer_sha256=sha256(text["tokenizer_json"]),
        chat_template_sha256=sha256(text["chat_template"].encode()),
    )
    return ModelDescription(model, config, card)


def sha256(file: bytes) -> str:
    """Hexadecimal; empty for an empty file, which stands for none."""
    return hashlib.sha256(file).hexdigest() if file else ""


def resolve_dtype(name: str, device: str) -> str:
    """The dtype of arithmetic; "auto" is bfloat16 on hardware that multiplies it, else float32. Raises ConfigError."""
    if name == "auto":
        has_bf16 = device.startswith("cuda") or not _BF16_INSTRUCTIONS.isdisjoint(cpu_flags())
        return "bfloat16" if has_bf16 else "float32"
    if name not in DTYPES:
        raise ConfigError(f"dtype must be auto, {', '.join(DTYPES)}, not {name!r}")
    return name


def resolve_kv_dtype(name: str, computed: str) -> str:
    """A dtype of `KvLayout`: "auto" is the `computed` one; int8 needs bfloat16 beside it. Raises ConfigError."""
    if name in ("auto", computed):
        return computed
    if name != "int8" or computed != "bfloat16":
        raise ConfigError(f"kv_dtype must be auto, or int8 with dtype bfloat16, not {name!r} with {computed}")
    return name


def fingerprint(weights: str, config: ModelConfig, layout: KvLayout) -> str:
    """Hexadecimal SHA-256 over the weights' checksum, the architecture and the KV's dtype and layout."""
    parts = {"weights": weights, "config": asdict(config), "layout": asdict(layout)}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def computed_by(card: LocalCard, facts: Mapping[str, str]) -> LocalCard:
    """The card of a deterministic worker, whose fingerprint only workers with equal arithmetic share."""
    return replace(card, fingerprint=extended_fingerprint(card.fingerprint, facts))


def _text_of_gguf(meta: Metadata) -> dict[str, Any]:
    """The fields of the card that concern text, by name."""
    eos = meta.ids("tokenizer.ggml.eos_token_id") + meta.ids("tokenizer.ggml.eot_token_id")
    bos = meta.ids("tokenizer.ggml.bos_token_id")
    return {
        "tokenizer_json": tokenizer.tokenizer_json(meta),
        "chat_template": meta.text("tokenizer.chat_template", ""),
        "eos_token_ids": tuple(sorted(set(eos))),
        "bos_token_id": bos[0] if bos and tokenizer.adds_bos(meta) else None,
        "bos_token": _piece(meta, bos),
        "eos_token": _piece(meta, eos),
    }


def _text_of_folder(model: ResolvedModel, config: Metadata) -> dict[str, Any]:
    path = model.path / "tokenizer.json"
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ModelFileError(f"{path}: {error.strerror or error}") from None
    settings = read_json(model.path / "tokenizer_config.json", optional=True)
    generation = read_json(model.path / "generation_config.json", optional=True)
    eos = config.ids("eos_token_id") + generation.ids("eos_token_id")
    return {
        "tokenizer_json": raw,
        "chat_template": _template(model, settings),
        "eos_token_ids": tuple(sorted(set(eos))),
        "bos_token_id": _leading_bos(model, raw, settings, config.ids("bos_token_id")),
        "bos_token": _special(settings, "bos_token"),
        "eos_token": _special(settings, "eos_token"),
    }


def _template(model: ResolvedModel, settings: Metadata) -> str:
    path = model.path / "chat_template.jinja"
    if path.exists():
        return path.read_text(encoding="utf-8")
    found = settings.get("chat_template")
    if isinstance(found, list):  # named templates
        found = next((entry.get("template") for entry in found if entry.get("name") == "default"), None)
    return found if isinstance(found, str) else ""


def _leading_bos(model: ResolvedModel, raw: bytes, settings: Metadata, bos: tuple[int, ...]) -> int | None:
    """The id that the folder's tokeniser puts first: by its settings or, if they are silent, by trying it."""
    if settings.get("add_bos_token") is not None and not settings.flag("add_bos_token"):
        return None
    try:
        parsed = Tokenizer.from_str(raw.decode())
    except Exception as error:  # noqa: BLE001 - the library raises Exception itself for JSON it can't use
        raise ModelFileError(f"{model.path / 'tokenizer.json'}: not a tokeniser: {error}") from None
    added = parsed.encode("").ids
    if settings.get("add_bos_token") is None:
        return added[0] if added and added[0] in (*bos, *_bos_of(parsed, settings)) else None
    return next(iter((*_bos_of(parsed, settings), *bos)), None)


def _bos_of(parsed: Tokenizer, settings: Metadata) -> tuple[int, ...]:
    token = _special(settings, "bos_token")
    found = parsed.token_to_id(token) if token else None
    return () if found is None else (found,)


def _special(settings: Metadata, name: str) -> str:
    """A special token of tokenizer_config.json, as text; empty when absent."""
    token = settings.get(name)
    if isinstance(token, dict):  # an AddedToken, spelled out
        token = token.get("content")
    return token if isinstance(token, str) else ""


def _piece(meta: Metadata, ids: tuple[int, ...]) -> str:
    """The text of the first id; empty without one."""
    pieces = meta.texts("tokenizer.ggml.tokens")
    return pieces[ids[0]] if ids and ids[0] < len(pieces) else ""
