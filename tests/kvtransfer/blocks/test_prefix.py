from __future__ import annotations

import json
import struct
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtransfer.blocks.prefix import Digests, block_digests, each_digest, prefix_root, usable_prefix

VECTORS: list[dict[str, Any]] = json.loads(Path(__file__).with_name("prefix_vectors.json").read_text())


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: str(vector["name"]))
def test_digests_are_those_of_the_published_vectors(vector: dict[str, Any]) -> None:
    digests = block_digests(vector["tokens"], vector["block_tokens"], vector["salt"], vector["fingerprint"])
    assert [digest.hex() for digest in digests] == vector["digests"]


@given(st.lists(st.integers(0, 2**32 - 1), max_size=80), st.integers(1, 16), st.text(max_size=8))
def test_a_longer_sequence_extends_the_chain(tokens: list[int], block_tokens: int, salt: str) -> None:
    digests = block_digests(tokens, block_tokens, salt, "f")
    assert len(digests) == len(tokens) // block_tokens
    assert digests[:2] == block_digests(tokens[: 2 * block_tokens], block_tokens, salt, "f")[:2]
    assert all(len(digest) == 16 for digest in digests)


def test_one_token_changes_all_that_follow() -> None:
    tokens = list(range(64))
    before, after = block_digests(tokens), block_digests([*tokens[:20], 99, *tokens[21:]])
    assert before[0] == after[0]
    assert all(a != b for a, b in zip(before[1:], after[1:], strict=True))


def test_the_root_keeps_tenants_and_models_apart() -> None:
    roots = {prefix_root(salt, fingerprint) for salt, fingerprint in (("", "ab"), ("a", "b"), ("ab", ""), ("", ""))}
    assert len(roots) == 4


def test_a_token_beyond_32_bits_is_an_error() -> None:
    with pytest.raises(struct.error):
        block_digests([2**32] * 16)
    assert len(list(islice(each_digest([0] * 16 + [2**32] * 16), 1))) == 1, "what is not taken is not computed"


def test_digests_are_made_once_and_only_as_far_as_they_are_asked_for() -> None:
    class Counted(list[int]):
        """Tokens that count how many blocks of them were looked at."""

        looked = 0

        def __getitem__(self, key: Any) -> Any:
            self.looked += 1
            return super().__getitem__(key)

    tokens = Counted(range(64))
    digests, all_of_them = Digests(tokens, 16, "salt", "print"), block_digests(list(range(64)), 16, "salt", "print")
    for wanted, looked in ((0, 0), (2, 2), (1, 2), (3, 3), (9, 4), (9, 4)):
        assert list(islice(digests, wanted)) == all_of_them[:wanted]
        assert tokens.looked == looked


@pytest.mark.parametrize(("tokens", "blocks", "usable"), [(33, 2, 32), (32, 2, 31), (1, 0, 0), (17, 0, 0), (40, 1, 16)])
def test_the_last_prompt_token_is_always_computed(tokens: int, blocks: int, usable: int) -> None:
    assert usable_prefix(tokens, blocks) == usable
