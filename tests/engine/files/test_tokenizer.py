"""Tokenisers out of GGUF files, against `transformers` and against the definition of SentencePiece BPE."""

from __future__ import annotations

import itertools
import json
import warnings
from typing import Any

import jinja2
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from baton.engine.files.card import ModelDescription, describe
from baton.engine.files.metadata import Metadata
from baton.engine.files.models import ResolvedModel
from baton.engine.files.tokenizer import adds_bos, tokenizer_json
from baton.errors import ModelFileError

TEXTS = [
    "What is the capital of France?",
    "  leading, trailing  \n\n\ttabs\r\nand   runs   ",
    "In 2024, 1234567 of 3.14159 and 10,000 x 0x1F",
    "naïve café, Ünïcödé; e\u0301 against é",
    "👩‍👩‍👧‍👦 family, 🇫🇷 flag, 👍🏽 tone",
    "日本語のテキスト 한국어 العربية हिन्दी",
    "def f(x):\n    return {'a': x**2, \"b\": [1, 2]}\n",
    "I'm we'll THEY'RE it's 'tis don't",
    "<|im_start|>user\nhello<|im_end|>\n<|endoftext|> <|not_special|>",
    "",
    "\u200b\ufeff\x00\x7f",
]


@pytest.fixture(scope="module")
def description(embedded: ResolvedModel) -> ModelDescription:
    return describe(embedded, "float32")


@pytest.fixture(scope="module")
def ours(description: ModelDescription) -> Tokenizer:
    return Tokenizer.from_str(description.card.tokenizer_json.decode())


@pytest.fixture(scope="module")
def reference(embedded: ResolvedModel) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(embedded.path.parent, gguf_file=embedded.path.name)


@pytest.mark.parametrize("text", TEXTS)
def test_the_embedded_tokeniser_matches_the_reference(text: str, ours: Tokenizer, reference: Any) -> None:
    assert ours.encode(text, add_special_tokens=False).ids == reference(text, add_special_tokens=False)["input_ids"]


def test_digits_stand_alone(ours: Tokenizer) -> None:
    """`transformers` overlooks this pre-tokeniser of GGUF files: it shows with digits outside of ASCII."""
    assert ours.encode("12345").tokens == ["1", "2", "3", "4", "5"]
    assert [piece for piece, _ in ours.pre_tokenizer.pre_tokenize_str("a ½٣")] == ["a", "Ġ", "Â½", "Ù£"]


# Its vocabulary lacks the pieces of some control characters, which it drops.
@given(st.text(st.characters(max_codepoint=0xFFFF, exclude_categories=["Cc", "Cs"]), max_size=60))
def test_the_embedded_tokeniser_loses_nothing(ours: Tokenizer, text: str) -> None:
    assert ours.decode(ours.encode(text).ids, skip_special_tokens=False) == text


def test_special_tokens_are_single_and_skipped(ours: Tokenizer) -> None:
    ids = ours.encode("<|im_start|>a<|im_end|>").ids
    assert (ids[0], ids[-1], len(ids)) == (1, 2, 3)
    assert ours.decode(ids) == "a"


def test_the_embedded_models_card_has_its_name_and_sizes(description: ModelDescription) -> None:
    card = description.card
    assert (card.name, card.context_tokens, card.vocabulary_size) == ("smollm2-135m", 8192, 49152)
    assert card.eos_token_ids == (2,)
    assert card.bos_token_id is None
    assert (card.kv_layout.layers, card.kv_layout.kv_heads, card.kv_layout.head_dim) == (30, 3, 64)


def test_chat_template_gives_the_references_ids(description: ModelDescription, ours: Tokenizer, reference: Any) -> None:
    messages = [
        {"role": "user", "content": "What is the capital of France?"},
        {"role": "assistant", "content": "Paris."},
        {"role": "user", "content": "And of Spain? 😀"},
    ]
    template = jinja2.Environment().from_string(description.card.chat_template)
    text = template.render(messages=messages, add_generation_prompt=True)
    expected = reference.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert ours.encode(text, add_special_tokens=False).ids == expected


def byte_level(pre: str, **extra: object) -> Metadata:
    pieces = [*(chr(code) for code in range(33, 127)), "Ġ", "ab", "1234", "<|x|>", "<think>"]
    kinds = [1] * (len(pieces) - 2) + [3, 4]
    values = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": ["a b"],
    }
    return Metadata("x.gguf", values | extra)


@pytest.mark.parametrize(
    ("pre", "groups"),
    [
        ("smollm", ["a", "1", "2", "3", "4"]),
        ("gpt-2", ["a", "1234"]),
        ("qwen2", ["a", "1", "2", "3", "4"]),
        ("llama-bpe", ["a", "123", "4"]),
        ("tekken", ["a", "1", "2", "3", "4"]),
    ],
)
def test_pre_tokenisers_cut_digits_their_own_way(pre: str, groups: list[str]) -> None:
    made = Tokenizer.from_str(tokenizer_json(byte_level(pre)).decode())
    assert [piece for piece, _ in made.pre_tokenizer.pre_tokenize_str("a1234")] == groups


def test_control_pieces_are_special_and_user_defined_ones_only_whole() -> None:
    made = Tokenizer.from_str(tokenizer_json(byte_level("qwen2")).decode())
    ids = made.encode("ab<|x|><think>").ids
    assert [made.id_to_token(index) for index in ids] == ["ab", "<|x|>", "<think>"]
    assert made.decode(ids) == "ab<think>"


def test_bos_follows_the_file_and_then_llama_cpp() -> None:
    assert not adds_bos(byte_level("smollm"))
    assert adds_bos(byte_level("llama-bpe"))
    assert not adds_bos(byte_level("llama-bpe", **{"tokenizer.ggml.add_bos_token": False}))


@pytest.mark.parametrize(
    ("meta", "named"),
    [
        (byte_level("klingon"), "'klingon'"),
        (byte_level("gpt-2", **{"tokenizer.ggml.model": "wordpiece"}), "'wordpiece'"),
        (byte_level("gpt-2", **{"tokenizer.ggml.merges": ["ab"]}), "'ab'"),
        (byte_level("gpt-2", **{"tokenizer.ggml.merges": ["a c"]}), "'ac'"),
        (byte_level("gpt-2", **{"tokenizer.ggml.token_type": [1]}), "1 token types"),
        (byte_level("gpt-2", **{"tokenizer.ggml.merges": None}), "merges is missing"),
    ],
)
def test_what_is_not_known_is_named(meta: Metadata, named: str) -> None:
    with pytest.raises(ModelFileError, match=named) as caught:
        tokenizer_json(meta)
    assert str(caught.value).startswith("x.gguf: ")


PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "c", "n"]
JOINED = ["▁a", "an", "▁b", "ana", "ban", "ba", "na", "▁ba", "▁ban", "▁▁", "bana"]


def sentencepiece(**extra: object) -> Metadata:
    scores = [0.0] * 259 + [-100.0 - index for index in range(5)] + [-1.0 - index for index in range(len(JOINED))]
    values = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": PIECES + JOINED,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * (5 + len(JOINED)),
    }
    return Metadata("x.gguf", values | extra)


def merge_by_score(text: str) -> list[str]:
    """SentencePiece BPE by definition: join the neighbours whose union scores highest, leftmost first."""
    rank = {piece: index for index, piece in enumerate(JOINED)}
    parts = list("▁" + text.replace(" ", "▁"))
    while True:
        unions = [(rank[a + b], at) for at, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in rank]
        if not unions:
            return parts
        _, at = min(unions)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


@given(st.text(alphabet="abcn ", min_size=1, max_size=20))
def test_sentencepiece_joins_by_score(text: str) -> None:
    made = Tokenizer.from_str(tokenizer_json(sentencepiece()).decode())
    encoded = made.encode(text)
    assert encoded.tokens == merge_by_score(text)
    assert made.decode(encoded.ids) == text


def test_sentencepiece_falls_back_to_bytes() -> None:
    made = Tokenizer.from_str(tokenizer_json(sentencepiece()).decode())
    encoded = made.encode("aé")
    assert encoded.tokens == ["▁a", "<0xC3>", "<0xA9>"]
    assert made.decode(encoded.ids) == "aé"
    assert made.decode(made.encode("<s>a").ids) == "a"


def test_sentencepiece_without_the_space_prefix() -> None:
    raw = tokenizer_json(sentencepiece(**{"tokenizer.ggml.add_space_prefix": False}))
    made = Tokenizer.from_str(raw.decode())
    assert made.encode("ban").tokens == ["ban"]
    assert json.loads(raw)["post_processor"] is None
