"""What others need to know of a model: shape of its KV, tokeniser, chat template, ids that end a text.

Reading it is cheap (no weights are touched but to checksum them, and that is cached) and needs no torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

from tokenizers import Tokenizer

from baton.engine.dtypes import resolve_dtype, resolve_kv_dtype
from baton.engine.files import config as hf_config
from baton.engine.files import gguf_config, tokenizer
from baton.engine.files.config import ModelConfig
from baton.engine.files.digests import weights_digest
from baton.engine.files.gguf_file import GgufFile
from baton.engine.files.metadata import Metadata, read_json, read_json_if_there
from baton.engine.files.models import ResolvedModel
from baton.errors import ModelFileError
from baton.identity import extended_fingerprint
from kvtransfer.blocks.layout import KvLayout


@dataclass(frozen=True, slots=True)
class ModelCard:
    """A model, as far as the router and other workers see it.

    Encode text with `add_special_tokens=False`: `bos_token_id` is what to put before a plain prompt, None where the
    model's own tokeniser would put nothing. A chat template writes its BOS itself, and knows it as
    `bos_token` (empty for none), the end of a turn as `eos_token`. `chat_template` is Jinja, empty
    where there is none. `fingerprint` is equal only where KV blocks mean the same: hexadecimal, and after
    it what `computed_by` adds.
    """

    name: str
    fingerprint: str
    context_tokens: int
    vocabulary_size: int
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    bos_token: str
    eos_token: str
    tokenizer_json: bytes
    chat_template: str
    kv_layout: KvLayout
    simulated: bool = False
    """Nothing is computed: `baton.engine.simulated`."""


@dataclass(frozen=True, slots=True)
class ModelDescription:
    """Everything about a model but its weights."""

    model: ResolvedModel
    config: ModelConfig
    card: ModelCard


@dataclass(frozen=True, slots=True)
class _Text:
    """The text side of a model file."""

    tokenizer_json: bytes
    chat_template: str
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    bos_token: str
    eos_token: str


def describe(
    model: ResolvedModel, dtype: str = "auto", device: str = "cpu", kv_dtype: str = "auto"
) -> ModelDescription:
    """Reads shape and card; `dtype` (of weights and arithmetic) may be "auto", `kv_dtype` too: the same, or int8.

    Raises ModelFileError where a file is missing, damaged or of an unknown kind, ConfigError for an unknown dtype.
    """
    if model.is_gguf:
        file = GgufFile(model.path)
        config, text = gguf_config.from_gguf(file), _text_of_gguf(file.metadata)
    else:
        settings = read_json(model.path / "config.json")
        config, text = hf_config.from_hf(settings), _text_of_folder(model, settings)
    kept = resolve_kv_dtype(kv_dtype, resolve_dtype(dtype, device))
    layout = KvLayout(config.layers, config.kv_heads, config.head_dim, kept)
    card = ModelCard(
        name=model.name,
        fingerprint=fingerprint(weights_digest(model.weight_files()), config, layout),
        context_tokens=config.context_tokens,
        vocabulary_size=config.vocabulary,
        eos_token_ids=text.eos_token_ids,
        bos_token_id=text.bos_token_id,
        bos_token=text.bos_token,
        eos_token=text.eos_token,
        tokenizer_json=text.tokenizer_json,
        chat_template=text.chat_template,
        kv_layout=layout,
    )
    return ModelDescription(model, config, card)


def fingerprint(weights: str, config: ModelConfig, layout: KvLayout) -> str:
    """SHA-256, in hexadecimal, over the weights' checksum, the architecture and the KV's dtype and layout."""
    parts = {"weights": weights, "config": asdict(config), "layout": asdict(layout)}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def computed_by(card: ModelCard, facts: Mapping[str, str]) -> ModelCard:
    """The card of a deterministic worker: only workers that compute in the same way have its fingerprint."""
    return replace(card, fingerprint=extended_fingerprint(card.fingerprint, facts))


def _text_of_gguf(meta: Metadata) -> _Text:
    eos = meta.ids("tokenizer.ggml.eos_token_id") + meta.ids("tokenizer.ggml.eot_token_id")
    bos = meta.ids("tokenizer.ggml.bos_token_id")
    return _Text(
        tokenizer_json=tokenizer.tokenizer_json(meta),
        chat_template=meta.text("tokenizer.chat_template", ""),
        eos_token_ids=tuple(sorted(set(eos))),
        bos_token_id=bos[0] if bos and tokenizer.adds_bos(meta) else None,
        bos_token=_piece(meta, bos),
        eos_token=_piece(meta, eos),
    )


def _text_of_folder(model: ResolvedModel, config: Metadata) -> _Text:
    raw = _read_tokenizer(model)
    settings = read_json_if_there(model.path / "tokenizer_config.json")
    generation = read_json_if_there(model.path / "generation_config.json")
    eos = config.ids("eos_token_id") + generation.ids("eos_token_id")
    return _Text(
        tokenizer_json=raw,
        chat_template=_template(model, settings),
        eos_token_ids=tuple(sorted(set(eos))),
        bos_token_id=_leading_bos(model, raw, settings, config.ids("bos_token_id")),
        bos_token=_special(settings, "bos_token"),
        eos_token=_special(settings, "eos_token"),
    )


def _read_tokenizer(model: ResolvedModel) -> bytes:
    path = model.path / "tokenizer.json"
    try:
        return path.read_bytes()
    except OSError as error:
        raise ModelFileError(f"{path}: {error.strerror or error}") from None


def _template(model: ResolvedModel, settings: Metadata) -> str:
    path = model.path / "chat_template.jinja"
    if path.exists():
        return path.read_text(encoding="utf-8")
    found = settings.get("chat_template")
    if isinstance(found, list):  # several, named
        found = next((entry.get("template") for entry in found if entry.get("name") == "default"), None)
    return found if isinstance(found, str) else ""


def _leading_bos(model: ResolvedModel, raw: bytes, settings: Metadata, bos: tuple[int, ...]) -> int | None:
    """What the folder's tokeniser puts first: as its settings say or, where they are silent, as it does."""
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
    """A special token of tokenizer_config.json, as text; empty where there is none."""
    token = settings.get(name)
    if isinstance(token, dict):  # an AddedToken, spelled out
        token = token.get("content")
    return token if isinstance(token, str) else ""


def _piece(meta: Metadata, ids: tuple[int, ...]) -> str:
    """The text of the first of these ids; empty where there is none."""
    pieces = meta.texts("tokenizer.ggml.tokens")
    return pieces[ids[0]] if ids and ids[0] < len(pieces) else ""
