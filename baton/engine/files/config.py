"""A model's shape, from a Hugging Face config.json or the header of a GGUF file.

config.json has the field names of `transformers`; version 5 writes `rope_parameters`, earlier ones `rope_theta` and
`rope_scaling`. The keys of GGUF: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, under "LLM"; there Mistral
models have the architecture `llama`, which computes the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from baton.engine.files.gguf_file import GgufFile
from baton.engine.files.metadata import Metadata

Architecture = Literal["llama", "mistral", "qwen2", "qwen3"]
ScalingKind = Literal["none", "linear", "llama3", "yarn", "factors"]

ROPE_FACTORS = "rope_freqs.weight"
ARCHITECTURES: tuple[Architecture, ...] = get_args(Architecture)


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond a model's first training length; see `rope`. `factors` divide the
    frequencies one by one: so GGUF files store llama3 scaling."""

    kind: ScalingKind = "none"
    factor: float = 1.0
    original_context_tokens: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    attention_factor: float | None = None
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    factors: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A decoder of the Llama family. `attention_bias` is of the query, key and value projections, `output_bias` of
    attention's output projection; `qk_norm` normalises each query and key head before rotation."""

    architecture: Architecture
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocabulary: int
    context_tokens: int
    rope_theta: float
    rms_eps: float
    rope_scaling: RopeScaling = RopeScaling()
    tied_embeddings: bool = False
    attention_bias: bool = False
    output_bias: bool = False
    qk_norm: bool = False


def from_hf(config: Metadata) -> ModelConfig:
    """Raises ModelFileError, naming it, for anything that this engine can't compute."""
    architecture = _known_architecture(config, config.text("model_type"))
    heads = config.positive("num_attention_heads")
    hidden = config.positive("hidden_size")
    context = config.positive("max_position_embeddings")
    _refuse_unsupported(config, architecture, context)
    bias = config.flag("attention_bias", architecture == "qwen2")
    return _checked(
        config,
        ModelConfig(
            architecture=architecture,
            layers=config.positive("num_hidden_layers"),
            hidden=hidden,
            heads=heads,
            kv_heads=config.positive("num_key_value_heads", heads),
            head_dim=config.positive("head_dim", max(1, hidden // heads)),
            mlp=config.positive("intermediate_size"),
            vocabulary=config.positive("vocab_size"),
            context_tokens=context,
            rope_theta=_rope(config).number("rope_theta", config.number("rope_theta", 10000.0)),
            rms_eps=config.number("rms_norm_eps"),
            rope_scaling=_scaling(config, context),
            tied_embeddings=config.flag("tie_word_embeddings", False),
            attention_bias=bias or architecture == "qwen2",
            output_bias=bias and architecture in ("llama", "qwen3"),
            qk_norm=architecture == "qwen3",
        ),
    )


def _known_architecture(source: Metadata, name: str) -> Architecture:
    for architecture in ARCHITECTURES:
        if name == architecture:
            return architecture
    raise source.error(f"architecture {name!r} is not supported; these are: {', '.join(ARCHITECTURES)}")


def _checked(source: Metadata, config: ModelConfig) -> ModelConfig:
    """The config unchanged. Raises ModelFileError if its numbers contradict each other."""
    if config.heads % config.kv_heads:
        raise source.error(f"{config.heads} heads can't share {config.kv_heads} key/value heads")
    if config.head_dim % 2:
        raise source.error(f"head_dim must be even for rotary embeddings, not {config.head_dim}")
    if config.rope_scaling.kind == "yarn" and config.rope_scaling.original_context_tokens < 1:
        raise source.error("yarn scaling needs the original context length")
    return config


def _refuse_window(source: Metadata, window: int, context: int) -> None:
    """Raises ModelFileError for a sliding window narrower than the context; a wider one has no effect."""
    if 0 < window < context:
        raise source.error(f"a sliding window of {window} tokens below the context of {context} is not supported")


def _refuse_unsupported(config: Metadata, architecture: Architecture, context: int) -> None:
    activation = config.text("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise config.error(f"hidden_act {activation!r} is not supported, only 'silu'")
    if config.flag("mlp_bias", False):
        raise config.error("mlp_bias is not supported")
    partial = _rope(config).number("partial_rotary_factor", config.number("partial_rotary_factor", 1.0))
    if partial != 1.0:
        raise config.error(f"partial_rotary_factor {partial} is not supported, only 1")
    if architecture == "mistral" or config.flag("use_sliding_window", False):
        _refuse_window(config, config.integer("sliding_window", 0), context)


def _rope(config: Metadata) -> Metadata:
    """`rope_parameters`, or its former name."""
    return config.section("rope_parameters" if config.get("rope_parameters") is not None else "rope_scaling")


def _scaling(config: Metadata, context: int) -> RopeScaling:
    rope = _rope(config)
    kind = rope.text("rope_type", rope.text("type", "default"))
    if kind == "default":
        return RopeScaling()
    original = rope.integer("original_max_position_embeddings", 0)
    if kind == "linear":
        return RopeScaling("linear", factor=rope.number("factor"))
    if kind == "llama3":
        return RopeScaling(
            "llama3",
            factor=rope.number("factor"),
            original_context_tokens=rope.positive("original_max_position_embeddings"),
            low_freq_factor=rope.number("low_freq_factor"),
            high_freq_factor=rope.number("high_freq_factor"),
        )
    if kind == "yarn":
        return RopeScaling(
            "yarn",
            factor=rope.number("factor", context / (original or context)),
            original_context_tokens=original or context,
            attention_factor=None if rope.get("attention_factor") is None else rope.number("attention_factor"),
            mscale=rope.number("mscale", 0.0),
            mscale_all_dim=rope.number("mscale_all_dim", 0.0),
            beta_fast=rope.number("beta_fast", 32.0) or 32.0,
            beta_slow=rope.number("beta_slow", 1.0) or 1.0,
            truncate=rope.flag("truncate", True),
        )
    raise config.error(f"rope scaling {kind!r} is not supported; these are: default, linear, llama3, yarn")


def from_gguf(file: GgufFile) -> ModelConfig:
    """Raises ModelFileError, naming it, for anything that this engine can't compute."""
    meta = file.metadata
    architecture = _known_architecture(meta, meta.text("general.architecture"))
    keys = meta.under(f"{architecture}.")
    heads, hidden = keys.positive("attention.head_count"), keys.positive("embedding_length")
    context = keys.positive("context_length")
    head_dim = keys.positive("attention.key_length", max(1, hidden // heads))
    _refuse_unsupported_gguf(keys, head_dim, context)
    return _checked(
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
            rope_scaling=_scaling_of_gguf(file, keys, context),
            tied_embeddings="output.weight" not in file.tensors,
            attention_bias="blk.0.attn_q.bias" in file.tensors,
            output_bias="blk.0.attn_output.bias" in file.tensors,
            qk_norm="blk.0.attn_q_norm.weight" in file.tensors,
        ),
    )


def _vocabulary(file: GgufFile) -> int:
    """Rows of the embedding: some files state no size, and some pad it."""
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise file.metadata.error("tensor token_embd.weight is missing")
    return embedding.shape[0]


def _refuse_unsupported_gguf(keys: Metadata, head_dim: int, context: int) -> None:
    if keys.integer("expert_count", 0) > 0:
        raise keys.error("mixture-of-experts models are not supported")
    for key in ("attention.value_length", "rope.dimension_count"):
        if (width := keys.integer(key, head_dim)) != head_dim:
            raise keys.error(f"{key} {width} other than the head size {head_dim} is not supported")
    _refuse_window(keys, keys.integer("attention.sliding_window", 0), context)


def _scaling_of_gguf(file: GgufFile, keys: Metadata, context: int) -> RopeScaling:
    if ROPE_FACTORS in file.tensors:
        return RopeScaling("factors", factors=tuple(file.read(ROPE_FACTORS).reshape(-1).tolist()))
    linear = keys.number("rope.scale_linear", 1.0)
    kind = keys.text("rope.scaling.type", "none" if linear == 1.0 else "linear")
    if kind == "none":
        return RopeScaling()
    if kind == "linear":
        return RopeScaling("linear", factor=keys.number("rope.scaling.factor", linear))
    if kind == "yarn":
        if (extra := keys.number("rope.scaling.attn_factor", 1.0)) != 1.0:
            raise keys.error(f"rope.scaling.attn_factor {extra} is not supported, only 1")
        return RopeScaling(
            "yarn",
            factor=keys.number("rope.scaling.factor"),
            original_context_tokens=keys.positive("rope.scaling.original_context_length", context),
            beta_fast=keys.number("rope.scaling.yarn_beta_fast", 32.0),
            beta_slow=keys.number("rope.scaling.yarn_beta_slow", 1.0),
        )
    raise keys.error(f"rope scaling {kind!r} is not supported; these are: none, linear, yarn")
