"""The hundred prompts of `prompts.txt`: chat, code, prose, lists, English and thirteen other languages; our own texts.

They have 1 to 350 tokens, half of them fewer than 25.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

FILE = Path(__file__).with_name("prompts.txt")
MARK = "%% "
CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
"""The embedded model's chat template with one question."""


@dataclass(frozen=True, slots=True)
class QualityPrompt:
    kind: str
    tokens: tuple[int, ...]


def read(tokenizer_json: bytes) -> list[QualityPrompt]:
    """All prompts, in order."""
    tokenizer = Tokenizer.from_str(tokenizer_json.decode())
    prompts = []
    for part in FILE.read_text(encoding="utf-8").split(MARK)[1:]:
        kind, _, text = part.partition("\n")
        written = CHAT.format(text.strip()) if kind == "chat" else text.rstrip("\n")
        prompts.append(QualityPrompt(kind, tuple(tokenizer.encode(written, add_special_tokens=False).ids)))
    return prompts
