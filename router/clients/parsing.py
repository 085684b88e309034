"""Parsing requests, so that bytes which are no valid message still get an answer that names the field.

protobuf refuses a whole message for one string that is not UTF-8, before any handler runs and without saying which.
So the deserialisers here never raise: they return the error, for the handler to raise. The field is found by parsing
the same bytes again with every string declared as bytes.

The length of the bytes comes first. What could hold up the event loop is not parsed there: the handler gets it as
`Unparsed`, and refuses it or hands it to the process for long texts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Generic, TypeAlias, TypeVar

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message

from baton.errors import InvalidArgument
from baton.v1 import generation_pb2
from router.clients.wire_scan import scan, too_large, too_many

REQUEST_LIMIT_BYTES = 4 * 1024 * 1024
BYTES_PER_TOKEN, BYTES_BESIDE_INPUT = 64, 64 * 1024
"""No text that fits a context has more bytes a token than this, and no request more beside its input."""
INLINE_BYTES, INLINE_MESSAGES = 16 * 1024, 128
"""What the event loop itself parses, renders and tokenises: 4,000 tokens of English take it some 7 ms, as many bytes of
digits, which are the worst, some 30 ms."""
INLINE_IDS_BYTES = 64 * 1024
"""A request with less than `INLINE_BYTES` beside its token ids: ids are only checked, 2 ms of them at most."""
M = TypeVar("M", bound=Message)


def limit_bytes(contexts: list[int]) -> int:
    """The most bytes of a request to models with such contexts, in tokens."""
    if not contexts:
        return REQUEST_LIMIT_BYTES  # it is refused anyhow
    return min(REQUEST_LIMIT_BYTES, BYTES_BESIDE_INPUT + BYTES_PER_TOKEN * max(contexts))


@dataclass(frozen=True, slots=True)
class Unparsed(Generic[M]):
    """The bytes of a request that is too long, or has too many messages, to be parsed in the event loop."""

    kind: type[M]
    data: bytes

    def labels(self, limit: int) -> dict[str, str]:
        """Its `model`, `request_id` and `tenant_salt`, empty where they are not set. Raises InvalidArgument for more
        than `limit` bytes and for bytes that are no message, each in a few milliseconds."""
        if len(self.data) > limit:
            raise too_large(self.kind, self.data, limit)
        found = scan(self.data)
        if not found.valid:
            raise _invalid(self.kind)
        if found.end < len(self.data):
            raise too_many(self.kind, self.data)
        fields = self.kind.DESCRIPTOR.fields_by_name
        extents = {name: found.values.get(fields[name].number) if name in fields else None for name in _LABELS}
        return {name: _text(name, self.data[slice(*extent)]) if extent else "" for name, extent in extents.items()}


_LABELS = ("model", "request_id", "tenant_salt")
Received: TypeAlias = M | Unparsed[M] | InvalidArgument
"""What a deserialiser returns."""


def parser(kind: type[M]) -> Callable[[bytes], Received[M]]:
    """A deserialiser for requests of this kind; it returns the error for bytes that are none."""

    def deserialise(data: bytes) -> Received[M]:
        if len(data) > INLINE_BYTES and not _ids_alone(kind, data):
            return Unparsed(kind, data)
        try:
            message = parse(kind, data)
        except InvalidArgument as error:
            return error
        chat = getattr(message, "chat", None)
        return Unparsed(kind, data) if chat is not None and len(chat.messages) > INLINE_MESSAGES else message

    return deserialise


def parse(kind: type[M], data: bytes) -> M:
    """Raises InvalidArgument for bytes that are no message of this kind."""
    try:
        return kind.FromString(data)
    except DecodeError:
        raise explain(kind, data) from None


def explain(kind: type[Message], data: bytes) -> InvalidArgument:
    """Why these bytes are no message of this kind."""
    shadow = _shadow_class(kind.DESCRIPTOR.full_name)()
    with contextlib.suppress(DecodeError):
        shadow.ParseFromString(data)
        for path, value in _text_fields(shadow, kind.DESCRIPTOR):
            try:
                _text(path, value)
            except InvalidArgument as error:
                return error
    return _invalid(kind)


def _invalid(kind: type[Message]) -> InvalidArgument:
    return InvalidArgument("", f"the request is not a valid {kind.DESCRIPTOR.name} message")


def _text(path: str, value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise InvalidArgument(path, f"is not valid UTF-8 at byte {error.start}") from None


def _ids_alone(kind: type[Message], data: bytes) -> bool:
    """Whether it is long for its token ids alone, and not very long."""
    ids = kind.DESCRIPTOR.fields_by_name.get("token_ids")
    if ids is None or len(data) > INLINE_IDS_BYTES:
        return False
    return len(data) - scan(data).sizes[ids.number] <= INLINE_BYTES


@cache
def _shadow_class(full_name: str) -> type[Message]:
    file = descriptor_pb2.FileDescriptorProto()
    generation_pb2.DESCRIPTOR.CopyToProto(file)
    for message in file.message_type:
        for field in message.field:
            if field.type == descriptor_pb2.FieldDescriptorProto.TYPE_STRING:
                field.type = descriptor_pb2.FieldDescriptorProto.TYPE_BYTES
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(full_name))


def _text_fields(shadow: Message, real: Any, prefix: str = "") -> Iterator[tuple[str, bytes]]:
    """Every string of a shadow message with its path; `real` is the descriptor of the message that it shadows."""
    for field, value in shadow.ListFields():
        true = real.fields_by_name[field.name]
        if true.message_type is None and true.type != FieldDescriptor.TYPE_STRING:
            continue
        values = list(value) if field.is_repeated else [value]
        for index, item in enumerate(values):
            path = f"{prefix}{field.name}" + (f"[{index}]" if field.is_repeated else "")
            if field.message_type is not None:
                yield from _text_fields(item, true.message_type, f"{path}.")
            else:
                yield path, item
