"""What a model's shape is: read from a Hugging Face config.json here, from a GGUF header in `gguf_config`.

The field names of config.json are those of `transformers`; version 5 writes `rope_parameters` where earlier ones
wrote `rope_theta` and `rope_scaling`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from baton.engine.files.metadata import Metadata

Architecture = Literal["llama", "mistral", "qwen2", "qwen3"]
ScalingKind = Literal["none", "linear", "llama3", "yarn", "factors"]

ARCHITECTURES: tuple[Architecture, ...] = get_args(Architecture)


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the length a model was first trained on; see `rope`.

    `factors` divides each frequency by its own number, which is how GGUF files store llama3 scaling.
    """

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
    """The shape of a decoder of the Llama family.

    `attention_bias` is on the query, key and value projections, `output_bias` on the attention's output projection;
    `qk_norm` normalises each query and key head before rotation.
    """

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

    @property
    def qkv_rows(self) -> int:
        """Rows of the fused projection: all query heads, then keys, then values."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim


def from_hf(config: Metadata) -> ModelConfig:
    """The shape in a config.json; raises ModelFileError for what this engine can't compute, naming it."""
    architecture = known_architecture(config, config.text("model_type"))
    heads = config.positive("num_attention_heads")
    hidden = config.positive("hidden_size")
    context = config.positive("max_position_embeddings")
    _refuse_unsupported(config, architecture, context)
    bias = config.flag("attention_bias", architecture == "qwen2")
    return checked(
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
            rope_theta=_theta(config),
            rms_eps=config.number("rms_norm_eps"),
            rope_scaling=_scaling(config, context),
            tied_embeddings=config.flag("tie_word_embeddings", False),
            attention_bias=bias or architecture == "qwen2",
            output_bias=bias and architecture in ("llama", "qwen3"),
            qk_norm=architecture == "qwen3",
        ),
    )


def known_architecture(source: Metadata, name: str) -> Architecture:
    for architecture in ARCHITECTURES:
        if name == architecture:
            return architecture
    raise source.error(f"architecture {name!r} is not supported; these are: {', '.join(ARCHITECTURES)}")


def checked(source: Metadata, config: ModelConfig) -> ModelConfig:
    """The same config, its numbers agreeing with each other; ModelFileError otherwise."""
    if config.heads % config.kv_heads:
        raise source.error(f"{config.heads} heads can't share {config.kv_heads} key/value heads")
    if config.head_dim % 2:
        raise source.error(f"head_dim must be even for rotary embeddings, not {config.head_dim}")
    if config.rope_scaling.kind == "yarn" and config.rope_scaling.original_context_tokens < 1:
        raise source.error("yarn scaling needs the original context length")
    return config


def refuse_window(source: Metadata, window: int, context: int) -> None:
    """Raises ModelFileError for a sliding window that would matter; one as wide as the context never does."""
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
        refuse_window(config, config.integer("sliding_window", 0), context)


def _rope(config: Metadata) -> Metadata:
    """`rope_parameters`, or what it was called before."""
    return config.section("rope_parameters" if config.get("rope_parameters") is not None else "rope_scaling")


def _theta(config: Metadata) -> float:
    return _rope(config).number("rope_theta", config.number("rope_theta", 10000.0))


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
        return _yarn(rope, original or context, context)
    raise config.error(f"rope scaling {kind!r} is not supported; these are: default, linear, llama3, yarn")


def _yarn(rope: Metadata, original: int, context: int) -> RopeScaling:
    return RopeScaling(
        "yarn",
        factor=rope.number("factor", context / original),
        original_context_tokens=original,
        attention_factor=None if rope.get("attention_factor") is None else rope.number("attention_factor"),
        mscale=rope.number("mscale", 0.0),
        mscale_all_dim=rope.number("mscale_all_dim", 0.0),
        beta_fast=rope.number("beta_fast", 32.0) or 32.0,
        beta_slow=rope.number("beta_slow", 1.0) or 1.0,
        truncate=rope.flag("truncate", True),
    )
