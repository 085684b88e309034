"""What the processes that serve one model agree on: its card, and the shape of its KV blocks.

A block holds all layers' keys and values of `block_tokens` tokens in one contiguous span, so that a block is one copy
or one send, and so is a layer's share of it: `[layer][key|value][head][token][dim]`. In int8, each head's tokens are
followed by their scales, one float32 a token.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

LAYOUT_VERSION = 1
BLOCK_TOKENS = 16
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}
SCALE_BYTES = {"int8": 4}
"""Scale of each token of a head, in the dtypes with scales."""


@dataclass(frozen=True, slots=True)
class KvLayout:
    """Workers can hand blocks over only with every field equal."""

    layers: int
    kv_heads: int
    head_dim: int
    dtype: str
    block_tokens: int = BLOCK_TOKENS
    version: int = LAYOUT_VERSION
    rank: int = 0
    ranks: int = 1

    def __post_init__(self) -> None:
        for name in ("layers", "kv_heads", "head_dim", "block_tokens", "ranks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.dtype not in DTYPE_BYTES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPE_BYTES)}, not {self.dtype!r}")

    @property
    def shape(self) -> tuple[int, ...]:
        """(layer, key|value, head, token, dim) of one block; in int8 the last two are the bytes of a share."""
        if self.dtype in SCALE_BYTES:
            return (self.layers, 2, self.kv_heads, self.share_bytes)
        return (self.layers, 2, self.kv_heads, self.block_tokens, self.head_dim)

    @property
    def share_bytes(self) -> int:
        """One head's keys or values in one block, with scales."""
        return self.block_tokens * (self.head_dim * DTYPE_BYTES[self.dtype] + SCALE_BYTES.get(self.dtype, 0))

    @property
    def block_bytes(self) -> int:
        return self.layers * 2 * self.kv_heads * self.share_bytes

    @property
    def token_bytes(self) -> int:
        """All layers' KV of one token."""
        return self.block_bytes // self.block_tokens

    def blocks_for(self, tokens: int) -> int:
        """Blocks for `tokens` tokens, rounded up."""
        return -(-tokens // self.block_tokens)

    def difference(self, other: KvLayout) -> tuple[str, str, str] | None:
        """The first unequal field with our value and theirs; None if blocks can be handed over."""
        mine, theirs = asdict(self), asdict(other)
        return next(((name, str(mine[name]), str(theirs[name])) for name in mine if mine[name] != theirs[name]), None)


@dataclass(frozen=True, slots=True)
class ModelCard:
    """A model, as far as routers and other workers see it: what all its workers have in common.

    `bos_token_id` goes before a plain prompt, unless None; a chat template writes BOS and the end of a turn itself, as
    `bos_token` and `eos_token`. `fingerprint` is equal only where KV blocks mean the same. The SHA-256 of tokeniser and
    chat template are hexadecimal; empty where there is no template.
    """

    name: str
    fingerprint: str
    context_tokens: int
    vocabulary_size: int
    eos_token_ids: tuple[int, ...]
    tokenizer_sha256: str
    chat_template_sha256: str
    kv_layout: KvLayout
    bos_token_id: int | None = None
    bos_token: str = ""
    eos_token: str = ""
    simulated: bool = False
    """Nothing is computed: `baton.engine.simulated`."""
