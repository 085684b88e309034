"""What the router and its process for long texts say to each other: frames of a kind, a length and a body."""

from __future__ import annotations

import enum
import json
import struct
from dataclasses import asdict, replace
from typing import NamedTuple

from baton import errors
from router.clients.preparation import TextModel
from router.text.tokenisation import Language, LanguageParts

HEAD = struct.Struct("<BI")
KEY = struct.Struct("<I")
"""Before a text: the number of the model that it is for."""
ERROR_CHARACTERS = 1_000
"""A message that quotes more of a text than this is cut off."""
_LENGTHS = struct.Struct("<II")


class FrameKind(enum.IntEnum):
    """The first three are the router's, the others are answers."""

    LOAD = 1
    GENERATE = 2
    TOKENIZE = 3
    DONE = 4
    REFUSED = 5
    FAILED = 6


class Loading(NamedTuple):
    """The process is to know this model as `key`, and to forget another one."""

    key: int
    forget: int | None
    model: TextModel


def pack_loading(loading: Loading) -> bytes:
    parts = loading.model.language.parts
    facts = {
        "key": loading.key,
        "forget": loading.forget,
        "context_tokens": loading.model.context_tokens,
        "vocabulary_size": loading.model.vocabulary_size,
        "parts": asdict(replace(parts, tokenizer_json=b"")) | {"tokenizer_json": None},
    }
    head = json.dumps(facts).encode()
    return _LENGTHS.pack(len(head), len(parts.tokenizer_json)) + head + parts.tokenizer_json


def unpack_loading(body: bytes) -> Loading:
    """Builds the language, which takes some tenths of a second."""
    head, size = _LENGTHS.unpack_from(body)
    start = _LENGTHS.size + head
    facts = json.loads(body[_LENGTHS.size : start])
    parts = LanguageParts(**facts["parts"] | {"tokenizer_json": body[start : start + size]})
    model = TextModel(Language(parts), facts["context_tokens"], facts["vocabulary_size"])
    return Loading(facts["key"], facts["forget"], model)


def pack_error(error: errors.BatonError) -> bytes:
    """Of what a text is refused with."""
    field, message = (error.field, error.message) if isinstance(error, errors.FieldError) else ("", str(error))
    return json.dumps([type(error).__name__, field, message[:ERROR_CHARACTERS]]).encode()


def unpack_error(body: bytes) -> errors.BatonError:
    name, field, message = json.loads(body)
    kind = getattr(errors, name)
    made: errors.BatonError = kind(field, message) if issubclass(kind, errors.FieldError) else kind(message)
    return made
