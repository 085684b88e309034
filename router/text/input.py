"""What a request wants to be completed, as plain values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

InputField = Literal["prompt", "token_ids", "chat"]


@dataclass(frozen=True, slots=True)
class Message:
    """One chat message."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Input:
    """What is to be completed; `field` says which of the other three is set."""

    field: InputField
    prompt: str = ""
    token_ids: tuple[int, ...] = ()
    messages: tuple[Message, ...] = ()
