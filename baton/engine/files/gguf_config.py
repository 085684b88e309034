"""A model's shape from the header of a GGUF file.

Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, under "LLM". Mistral models carry the architecture
`llama` there, which computes the same.
"""

from __future__ import annotations

from baton.engine.files.config import ModelConfig, RopeScaling, checked, known_architecture, refuse_window
from baton.engine.files.gguf_file import GgufFile
from baton.engine.files.metadata import Metadata

ROPE_FACTORS = "rope_freqs.weight"


def from_gguf(file: GgufFile) -> ModelConfig:
    """Raises ModelFileError for what this engine can't compute, naming it."""
    meta = file.metadata
    architecture = known_architecture(meta, meta.text("general.architecture"))
    keys = Metadata(meta.source, _strip_prefix(meta, architecture))
    heads, hidden = keys.positive("attention.head_count"), keys.positive("embedding_length")
    context = keys.positive("context_length")
    head_dim = keys.positive("attention.key_length", max(1, hidden // heads))
    _refuse_unsupported(keys, head_dim, context)
    return checked(
        meta,
        ModelConfig(
            architecture=architecture,
            layers=keys.positive("block_count"),
            hidden=hidden,
            heads=heads,
            kv_heads=keys.positive("attention.head_count_kv", heads),
            head_dim=head_dim,
            mlp=keys.positive("feed_forward_length"),
            vocabulary=_vocabulary(file),
            context_tokens=context,
            rope_theta=keys.number("rope.freq_base", 10000.0),
            rms_eps=keys.number("attention.layer_norm_rms_epsilon"),
            rope_scaling=_scaling(file, keys, context),
            tied_embeddings="output.weight" not in file.tensors,
            attention_bias="blk.0.attn_q.bias" in file.tensors,
            output_bias="blk.0.attn_output.bias" in file.tensors,
            qk_norm="blk.0.attn_q_norm.weight" in file.tensors,
        ),
    )


_KEYS = (
    "block_count",
    "embedding_length",
    "context_length",
    "feed_forward_length",
    "expert_count",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "attention.sliding_window",
    "rope.freq_base",
    "rope.dimension_count",
    "rope.scale_linear",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.attn_factor",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
)


def _strip_prefix(meta: Metadata, architecture: str) -> dict[str, object]:
    return {key: meta.get(f"{architecture}.{key}") for key in _KEYS}


def _vocabulary(file: GgufFile) -> int:
    """Rows of the embedding: some files state no size, and some pad it."""
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise file.metadata.error("tensor token_embd.weight is missing")
    return embedding.shape[0]


def _refuse_unsupported(keys: Metadata, head_dim: int, context: int) -> None:
    if keys.integer("expert_count", 0) > 0:
        raise keys.error("mixture-of-experts models are not supported")
    for key in ("attention.value_length", "rope.dimension_count"):
        if (width := keys.integer(key, head_dim)) != head_dim:
            raise keys.error(f"{key} {width} other than the head size {head_dim} is not supported")
    refuse_window(keys, keys.integer("attention.sliding_window", 0), context)


def _scaling(file: GgufFile, keys: Metadata, context: int) -> RopeScaling:
    if ROPE_FACTORS in file.tensors:
        return RopeScaling("factors", factors=tuple(file.read(ROPE_FACTORS).reshape(-1).tolist()))
    linear = keys.number("rope.scale_linear", 1.0)
    kind = keys.text("rope.scaling.type", "none" if linear == 1.0 else "linear")
    if kind == "none":
        return RopeScaling()
    if kind == "linear":
        return RopeScaling("linear", factor=keys.number("rope.scaling.factor", linear))
    if kind == "yarn":
        return _yarn(keys, context)
    raise keys.error(f"rope scaling {kind!r} is not supported; these are: none, linear, yarn")


def _yarn(keys: Metadata, context: int) -> RopeScaling:
    if (extra := keys.number("rope.scaling.attn_factor", 1.0)) != 1.0:
        raise keys.error(f"rope.scaling.attn_factor {extra} is not supported, only 1")
    return RopeScaling(
        "yarn",
        factor=keys.number("rope.scaling.factor"),
        original_context_tokens=keys.positive("rope.scaling.original_context_length", context),
        beta_fast=keys.number("rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=keys.number("rope.scaling.yarn_beta_slow", 1.0),
    )
