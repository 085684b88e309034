"""From a request's bytes to its token ids: what the event loop does with a short text, and the process with a long one.

The process answers with bytes: of a GenerateRequest the request without its input, and the ids; of a TokenizeRequest
the response.
"""

from __future__ import annotations

import struct
from array import array
from dataclasses import dataclass
from typing import get_args

from baton.v1 import generation_pb2 as gen
from router.clients.parsing import parse
from router.clients.validation import (
    Checked,
    check_ids,
    check_input,
    check_length,
    check_messages,
    check_request,
)
from router.text.tokenisation import Input, InputField, Language

_FIELDS: tuple[InputField, ...] = get_args(InputField)
_HEAD = struct.Struct("<BI")
"""Of a prepared request: which input it had, and the length of the message that follows. The rest are ids."""


@dataclass(frozen=True, slots=True)
class TextModel:
    """What a model's texts are tokenised with and checked against."""

    language: Language
    context_tokens: int
    vocabulary_size: int


def tokenise(given: Input, model: TextModel) -> tuple[tuple[int, ...], str]:
    """Ids and the text that they were made from. Raises InvalidArgument."""
    check_messages(len(given.messages), model.context_tokens)
    ids, text = model.language.tokenise(given)
    check_ids("token_ids.ids", ids, model.vocabulary_size)
    return ids, text


def prepare(data: bytes, model: TextModel) -> bytes:
    """A GenerateRequest, for `prepared`. Raises what the event loop would raise for it: InvalidArgument,
    Unimplemented."""
    message = parse(gen.GenerateRequest, data)
    check_messages(len(message.chat.messages), model.context_tokens)
    checked = check_request(message)
    ids, _ = tokenise(checked.input, model)
    check_ids("stopping.stop_token_ids", checked.stop_token_ids, model.vocabulary_size)
    check_length(checked, len(ids), model.language.model, model.context_tokens, model.context_tokens)
    for field in _FIELDS:
        message.ClearField(field)
    message.DiscardUnknownFields()
    rest = message.SerializeToString()
    return _HEAD.pack(_FIELDS.index(checked.input.field), len(rest)) + rest + array("I", ids).tobytes()


def prepared(answer: bytes) -> tuple[Checked, tuple[int, ...]]:
    """The request, whose input has no content any more, and its ids."""
    field, size = _HEAD.unpack_from(answer)
    message = gen.GenerateRequest.FromString(answer[_HEAD.size : _HEAD.size + size])
    ids = array("I", answer[_HEAD.size + size :])
    return check_request(message, Input(_FIELDS[field])), tuple(ids)


def answer_tokenize(data: bytes, model: TextModel) -> bytes:
    """The response to a TokenizeRequest, serialised. Raises InvalidArgument."""
    message = parse(gen.TokenizeRequest, data)
    check_messages(len(message.chat.messages), model.context_tokens)
    return respond(check_input(message), model)


def respond(given: Input, model: TextModel) -> bytes:
    """A TokenizeResponse, serialised. Raises InvalidArgument."""
    ids, text = tokenise(given, model)
    return gen.TokenizeResponse(ids=ids, text=text).SerializeToString()
