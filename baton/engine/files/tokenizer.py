"""Converts the tokeniser inside a GGUF file to the JSON of the `tokenizers` library.

Two kinds exist: `gpt2`, byte-level BPE with merges and a named pre-tokeniser, and `llama`, SentencePiece BPE whose
merges follow from the scores of its pieces.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from functools import partial

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from baton.engine.files.metadata import Metadata

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3_SPLIT = rf"{_WORDS}|\p{{N}}{{1,3}}|{_REST}"
_QWEN2_SPLIT = rf"{_WORDS}|\p{{N}}|{_REST}"
_TEKKEN_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


PieceKind = IntEnum("PieceKind", "NORMAL UNKNOWN CONTROL USER_DEFINED UNUSED BYTE")
"""`tokenizer.ggml.token_type`, from 1."""


def tokenizer_json(meta: Metadata) -> bytes:
    """The tokeniser as UTF-8 JSON, without a post-processor, so that it adds no token that the text does not hold.
    Raises ModelFileError, naming it, for an unknown tokeniser or pre-tokeniser."""
    kind = meta.text("tokenizer.ggml.model")
    builders = {"gpt2": _byte_level, "llama": _sentencepiece}
    if kind not in builders:
        raise meta.error(f"tokenizer.ggml.model {kind!r} is not supported; these are: {', '.join(builders)}")
    pieces = meta.texts("tokenizer.ggml.tokens")
    kinds: list[int] = [PieceKind.NORMAL] * len(pieces)
    if meta.get("tokenizer.ggml.token_type") is not None:
        kinds = [int(kind) for kind in meta.numbers("tokenizer.ggml.token_type")]
    if len(kinds) != len(pieces):
        raise meta.error(f"{len(kinds)} token types do not fit {len(pieces)} tokens")
    tokenizer = builders[kind](meta, pieces, kinds)
    tokenizer.add_special_tokens(_added(pieces, kinds, PieceKind.CONTROL))
    tokenizer.add_tokens(_added(pieces, kinds, PieceKind.USER_DEFINED))
    return tokenizer.to_str().encode()


def adds_bos(meta: Metadata) -> bool:
    """Whether the model's tokeniser puts a BOS before plain text; without an entry in the file, llama.cpp's default."""
    silent = meta.text("tokenizer.ggml.model") == "llama" or meta.text("tokenizer.ggml.pre", "") in _WHOLE_WORDS_FIRST
    return meta.flag("tokenizer.ggml.add_bos_token", silent)


def _added(pieces: list[str], kinds: list[int], wanted: PieceKind) -> list[AddedToken]:
    special = wanted is PieceKind.CONTROL
    chosen = [piece for piece, kind in zip(pieces, kinds, strict=True) if kind == wanted]
    return [AddedToken(piece, special=special, normalized=False) for piece in chosen]


def _byte_level(meta: Metadata, pieces: list[str], kinds: list[int]) -> Tokenizer:
    name = meta.text("tokenizer.ggml.pre", "default")
    if name not in _PRE_TOKENISERS:
        known = ", ".join(_PRE_TOKENISERS)
        raise meta.error(f"pre-tokeniser (tokenizer.ggml.pre) {name!r} is not supported; these are: {known}")
    merges = [_merge(meta, line) for line in meta.texts("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(_bpe(meta, pieces, merges, ignore_merges=name in _WHOLE_WORDS_FIRST))
    if name in _QWEN2_NAMES:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _PRE_TOKENISERS[name]()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _merge(meta: Metadata, line: str) -> tuple[str, str]:
    left, separator, right = line.partition(" ")
    if not separator:
        raise meta.error(f"tokenizer.ggml.merges holds {line!r}, which is no pair")
    return left, right


def _bpe(meta: Metadata, pieces: list[str], merges: list[tuple[str, str]], **options: object) -> models.BPE:
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    for pair in merges:
        if missing := [piece for piece in (*pair, "".join(pair)) if piece not in vocabulary]:
            raise meta.error(f"tokenizer.ggml.merges names {missing[0]!r}, which is no token")
    return models.BPE(vocab=vocabulary, merges=merges, **options)


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    """Cuts by `pattern` first, then maps bytes to printable characters."""
    to_characters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), to_characters])


def _gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


# The names are those that llama.cpp's converter gives (convert_hf_to_gguf.py, get_vocab_base_pre).
_LLAMA3_NAMES = ("llama-bpe", "llama3", "llama-v3")
_WHOLE_WORDS_FIRST = (*_LLAMA3_NAMES, "tekken")  # these keep a word that is a piece whole, and put a BOS by default
_QWEN2_NAMES = ("qwen2", "deepseek-r1-qwen")
_PRE_TOKENISERS: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "default": _gpt2,
    "gpt-2": _gpt2,
    "smollm": lambda: pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()]),
    "tekken": partial(_split, _TEKKEN_SPLIT),
    **dict.fromkeys(_LLAMA3_NAMES, partial(_split, _LLAMA3_SPLIT)),
    **dict.fromkeys(_QWEN2_NAMES, partial(_split, _QWEN2_SPLIT)),
}


def _sentencepiece(meta: Metadata, pieces: list[str], kinds: list[int]) -> Tokenizer:
    scores = meta.numbers("tokenizer.ggml.scores")
    if len(scores) != len(pieces):
        raise meta.error(f"{len(scores)} scores do not fit {len(pieces)} tokens")
    unknown = next((piece for piece, kind in zip(pieces, kinds, strict=True) if kind == PieceKind.UNKNOWN), None)
    merges = merges_from_scores(pieces, scores, kinds)
    tokenizer = Tokenizer(_bpe(meta, pieces, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefix = meta.flag("tokenizer.ggml.add_space_prefix", True)
    spaces = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    steps: list[decoders.Decoder] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def merges_from_scores(pieces: list[str], scores: list[float], kinds: list[int]) -> list[tuple[str, str]]:
    """BPE merges, best first, that cut text as SentencePiece does, which joins the pair whose union scores highest.
    Every cut of a piece into two others is a merge of that piece's rank, shorter left parts first."""
    ordinary = {
        piece: score
        for piece, score, kind in zip(pieces, scores, kinds, strict=True)
        if kind in (PieceKind.NORMAL, PieceKind.USER_DEFINED, PieceKind.UNUSED)
    }
    ranked = sorted(ordinary, key=lambda piece: -ordinary[piece])  # stable: equal scores stay in the order of ids
    cuts = ((piece[:cut], piece[cut:]) for piece in ranked for cut in range(1, len(piece)))
    return [(left, right) for left, right in cuts if left in ordinary and right in ordinary]
