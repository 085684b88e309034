"""Parsing requests, so that bytes which are no valid message still get an answer that names the field.

protobuf refuses a whole message for one string that is not UTF-8, before any handler runs and without saying which.
So the deserialisers here never raise: they return the error, for the handler to raise. The field is found by parsing
the same bytes again with every string declared as bytes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, TypeVar

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message

from baton.errors import InvalidArgument
from baton.v1 import generation_pb2

REQUEST_LIMIT_BYTES = 4 * 1024 * 1024
M = TypeVar("M", bound=Message)


def parser(kind: type[M]) -> Callable[[bytes], M | InvalidArgument]:
    """A deserialiser for requests of this kind; it returns the error for bytes that are none."""

    def parse(data: bytes) -> M | InvalidArgument:
        try:
            message = kind.FromString(data)
        except DecodeError:
            return explain(kind, data)
        if len(data) > REQUEST_LIMIT_BYTES:
            field, size = largest_field(message)
            error = f"takes {size} of {len(data)} bytes; a request has at most {REQUEST_LIMIT_BYTES}"
            return InvalidArgument(field, error)
        return message

    return parse


def explain(kind: type[Message], data: bytes) -> InvalidArgument:
    """Why these bytes are no message of this kind."""
    shadow = _shadow_class(kind.DESCRIPTOR.full_name)()
    with contextlib.suppress(DecodeError):
        shadow.ParseFromString(data)
        for path, value in _text_fields(shadow, kind.DESCRIPTOR):
            try:
                value.decode()
            except UnicodeDecodeError as error:
                return InvalidArgument(path, f"is not valid UTF-8 at byte {error.start}")
    return InvalidArgument("", f"the request is not a valid {kind.DESCRIPTOR.name} message")


def largest_field(message: Message) -> tuple[str, int]:
    """The path of the top-level field, or of the field in it, that takes the most bytes, and their number."""
    sizes = [(type(message)(**{field.name: value}).ByteSize(), field, value) for field, value in message.ListFields()]
    size, field, value = max(sizes, key=lambda entry: entry[0])
    if field.message_type is not None and not field.is_repeated and value.ListFields():
        inner, size = largest_field(value)
        return f"{field.name}.{inner}", size
    return field.name, size


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
        values = list(value) if field.is_repeated else [value]
        for index, item in enumerate(values):
            path = f"{prefix}{field.name}" + (f"[{index}]" if field.is_repeated else "")
            if field.message_type is not None:
                yield from _text_fields(item, true.message_type, f"{path}.")
            elif true.type == FieldDescriptor.TYPE_STRING:
                yield path, item
