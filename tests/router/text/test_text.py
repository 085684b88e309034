"""From ids to text: whatever the cuts, the pieces together are the whole."""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from baton.engine.files.download import fetch_embedded
from baton.engine.files.gguf_file import GgufFile
from baton.engine.files.tokenizer import tokenizer_json
from baton.errors import InvalidArgument, NotFound
from router.text.detokenisation import HELD_TOKENS, Detokeniser, OutputText, StopMatcher, WholeTokens
from router.text.tokenisation import Input, Language, LanguageParts, Message
from tests.router.tiny_model import EOS, TEMPLATE, encode, tokenizer

VOCABULARY = tokenizer().get_vocab_size()
TEXT = st.text(alphabet="ab é漢😀\n", max_size=40)


@cache
def byte_fallback() -> Tokenizer:
    """As the sentencepiece models have it: letters with a leading mark for a space, and single bytes."""
    vocabulary = {"<unk>": 0, **{f"<0x{byte:02X}>": 1 + byte for byte in range(256)}}
    for text in ("▁a", "a", "▁b", "b", "é"):
        vocabulary[text] = len(vocabulary)
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return made


def pieces(decoder: Tokenizer, ids: list[int]) -> list[str]:
    found = _pieces(Detokeniser(decoder, frozenset()), ids)
    if isinstance(decoder.decoder, decoders.ByteLevel):
        assert _pieces(Detokeniser(decoder, frozenset(), WholeTokens(decoder)), ids) == found, "a faster way, no other"
    return found


def _pieces(detokeniser: Detokeniser, ids: list[int]) -> list[str]:
    return [*(detokeniser.push(token) for token in ids), detokeniser.flush()]


@given(TEXT)
def test_text_comes_back_whole_and_never_broken(text: str) -> None:
    found = pieces(tokenizer(), encode(text))
    assert "".join(found) == text
    assert "\ufffd" not in "".join(found)


@given(st.lists(st.integers(3, VOCABULARY - 1), max_size=HELD_TOKENS - 1))
@settings(max_examples=300)
def test_any_tokens_decode_as_they_do_together(ids: list[int]) -> None:
    assert "".join(pieces(tokenizer(), ids)) == tokenizer().decode(ids, skip_special_tokens=False)


@given(st.lists(st.sampled_from(["▁a", "a", "▁b", "é", "😀", "漢"]), max_size=15))
def test_byte_fallback_comes_back_whole(words: list[str]) -> None:
    vocabulary = byte_fallback().get_vocab()
    ids = [
        token
        for word in words
        for token in (
            [vocabulary[word]] if word in vocabulary else [vocabulary[f"<0x{byte:02X}>"] for byte in word.encode()]
        )
    ]
    found = "".join(pieces(byte_fallback(), ids))
    assert found == byte_fallback().decode(ids, skip_special_tokens=False)


@cache
def real() -> Tokenizer:
    """The embedded model's own tokeniser."""
    return Tokenizer.from_buffer(tokenizer_json(GgufFile(fetch_embedded()).metadata))


@given(st.lists(st.integers(0, 49_151), max_size=HELD_TOKENS - 1))
@settings(deadline=None)
def test_any_tokens_of_the_embedded_model_decode_as_they_do_together(ids: list[int]) -> None:
    assert "".join(pieces(real(), ids)) == real().decode(ids, skip_special_tokens=False)


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=40))
@settings(deadline=None)
def test_any_text_decodes_from_the_embedded_models_tokens_as_it_does_together(text: str) -> None:
    ids = real().encode(text, add_special_tokens=False).ids
    assert "".join(pieces(real(), ids)) == real().decode(ids, skip_special_tokens=False)


def test_what_never_becomes_a_character_is_not_held_for_ever() -> None:
    broken = tokenizer().get_vocab()[tokenizer().encode("😀", add_special_tokens=False).tokens[0]]
    detokeniser = Detokeniser(tokenizer(), frozenset())
    out = [detokeniser.push(broken) for _ in range(5 * HELD_TOKENS)]
    assert sum(map(bool, out)) >= 4
    assert len(detokeniser._window) <= 2 * HELD_TOKENS


def test_skipped_ids_have_no_text() -> None:
    detokeniser = Detokeniser(tokenizer(), frozenset({EOS, 17}))
    assert "".join(detokeniser.push(token) for token in [*encode("on"), EOS, 17, *encode("e")]) == "one"


@given(
    text=st.text(alphabet="ab", max_size=30),
    cuts=st.lists(st.integers(0, 30), max_size=6),
    stops=st.lists(st.text(alphabet="ab", min_size=1, max_size=4), min_size=1, max_size=3),
)
@settings(max_examples=400)
def test_stops_are_found_wherever_the_text_is_cut(text: str, cuts: list[int], stops: list[str]) -> None:
    ends = [text.index(stop) + len(stop) for stop in stops if stop in text]
    first = min(ends, default=None)
    matcher, out, found = StopMatcher(tuple(stops)), "", None
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    for start, end in pairwise(edges):
        piece, found = matcher.push(text[start:end])
        out += piece
        assert text.startswith(out)
        if found:
            break
    if first is None:
        assert found is None
        assert out + matcher.flush() == text
    else:
        assert found is not None
        longest = max((stop for stop in stops if text[:first].endswith(stop)), key=len)
        assert (found, out) == (longest, text[: first - len(longest)])


def test_only_what_may_become_a_stop_is_held() -> None:
    matcher = StopMatcher(("abc",))
    assert matcher.push("xab") == ("x", None)
    assert matcher.push("ab") == ("ab", None)
    assert matcher.push("d") == ("abd", None)
    assert matcher.push("zabc!") == ("z", "abc")


def test_the_flush_may_complete_a_stop() -> None:
    output = OutputText(Detokeniser(tokenizer(), frozenset()), StopMatcher(("\ufffd",)))
    split = encode("😀")[:2]
    assert [output.push(token) for token in split] == [("", None), ("", None)]
    assert output.flush() == ("", "\ufffd")


def language(template: str | None = TEMPLATE, **changes: Any) -> Language:
    return Language(LanguageParts("tiny", tokenizer().to_str().encode(), template, **changes))


def test_a_plain_prompt_gets_the_models_first_token() -> None:
    assert language().tokenise(Input("prompt", prompt="hello")) == (tuple(encode("hello")), "hello")
    assert language(bos_token_id=1).tokenise(Input("prompt", prompt="hello"))[0] == (1, *encode("hello"))
    chat = Input("chat", messages=(Message("user", "hello"),))
    assert language(bos_token_id=1).tokenise(chat) == language().tokenise(chat)


def test_special_tokens_in_a_prompt_are_read_as_such() -> None:
    assert language().tokenise(Input("prompt", prompt="a<|im_end|>"))[0][-1] == EOS


def test_templates_find_what_transformers_offers() -> None:
    template = "{{ bos_token }}|{{ eos_token }}|{{ messages[0] | tojson }}|{{ strftime_now('%Y') | length }}"
    template += "{% generation %}!{% endgeneration %}{% for x in [1, 2] %}{% break %}{% endfor %}"
    text = language(template, bos_token="<|im_start|>", eos_token="<|im_end|>").render((Message("user", "<é>"),))
    assert text == '<|im_start|>|<|im_end|>|{"role": "user", "content": "<é>"}|4!'


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no') }}",
        "{{ messages[7].role.nothing }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{% for a in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
        "{{ 1 / 0 }}",
        "{{ messages + 1 }}",
    ],
)
def test_a_template_that_fails_or_misbehaves_names_the_chat(template: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        language(template).render((Message("user", "x"),))
    assert caught.value.field == "chat"


def test_no_template_no_chat() -> None:
    with pytest.raises(InvalidArgument, match="no chat template"):
        language(None).render((Message("user", "x"),))


@pytest.mark.parametrize(("data", "template"), [(b"{", TEMPLATE), (b"", TEMPLATE), (None, "{% for %}")])
def test_artifacts_that_cannot_be_read_are_refused(data: bytes | None, template: str) -> None:
    with pytest.raises(NotFound):
        Language(LanguageParts("tiny", tokenizer().to_str().encode() if data is None else data, template))
