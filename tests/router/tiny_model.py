"""The model that all worker doubles serve: its card, tokeniser and chat template."""

from __future__ import annotations

import hashlib
from functools import cache
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from baton.v1 import worker_pb2 as wire

TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['content'] == 'forbidden' %}{{ raise_exception('not this') }}{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
EOS = 2
CONTEXT = 65_536


@cache
def tokenizer() -> Tokenizer:
    """A byte-level BPE of 400 tokens; 0, 1 and 2 are special, 2 ends a sequence."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[AddedToken(text, special=True) for text in ("<|end|>", "<|im_start|>", "<|im_end|>")],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(
        ["the capital of France is Paris", "hello world, this is a test of the stream"] * 9, trainer
    )
    return made


def encode(text: str) -> list[int]:
    return list(tokenizer().encode(text, add_special_tokens=False).ids)


def artifacts() -> dict[str, bytes]:
    """What FetchArtifact sends, by SHA-256."""
    files = [tokenizer().to_str().encode(), TEMPLATE.encode()]
    return {hashlib.sha256(data).hexdigest(): data for data in files}


def card(**changes: Any) -> wire.ModelCard:
    layout = wire.KvLayout(version=1, block_tokens=16, layers=2, kv_heads=1, head_dim=8, dtype="float32", ranks=1)
    tokenizer_sha, template_sha = artifacts()
    fields: dict[str, Any] = {
        "name": "tiny",
        "fingerprint": "f" * 32,
        "context_tokens": CONTEXT,
        "vocabulary_size": tokenizer().get_vocab_size(),
        "eos_token_ids": [EOS],
        "tokenizer_sha256": tokenizer_sha,
        "chat_template_sha256": template_sha,
        "kv_layout": layout,
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
    }
    return wire.ModelCard(**(fields | changes))
