"""Parsing what clients send, so that bytes which are no valid message still get an answer that names the field.

protobuf refuses a whole message for one string that is not UTF-8, before any handler runs and without saying which.
So the deserialisers here never raise: on failure they return `Unreadable`, which carries the error to the handler.
The field is found by parsing the same bytes again with every string declared as bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message

from baton.errors import InvalidArgument
from baton.v1 import generation_pb2

REQUEST_LIMIT_BYTES = 4 * 1024 * 1024
M = TypeVar("M", bound=Message)


@dataclass(frozen=True, slots=True)
class Unreadable:
    """Stands for a request that could not be read."""

    error: InvalidArgument


def parser(kind: type[M]) -> Callable[[bytes], M | Unreadable]:
    """A deserialiser for requests of this kind that never raises."""

    def parse(data: bytes) -> M | Unreadable:
        try:
            message = kind.FromString(data)
        except DecodeError:
            return Unreadable(explain(kind, data))
        if len(data) > REQUEST_LIMIT_BYTES:
            field, size = largest_field(message)
            return Unreadable(
                InvalidArgument(
                    field,
                    f"takes {size} of {len(data)} bytes; a request has at most {REQUEST_LIMIT_BYTES}",
                )
            )
        return message

    return parse


def explain(kind: type[Message], data: bytes) -> InvalidArgument:
    """Why these bytes are no message of this kind."""
    shadow = _shadow_class(kind.DESCRIPTOR.full_name)()
    try:
        shadow.ParseFromString(data)
    except DecodeError:
        return InvalidArgument("", f"the request is not a valid {kind.DESCRIPTOR.name} message")
    for path, value in _text_fields(shadow, kind.DESCRIPTOR):
        try:
            value.decode()
        except UnicodeDecodeError as error:
            return InvalidArgument(path, f"is not valid UTF-8 at byte {error.start}")
    return InvalidArgument("", f"the request is not a valid {kind.DESCRIPTOR.name} message")


def largest_field(message: Message) -> tuple[str, int]:
    """The path of the top-level field, or of the field in it, that takes most bytes, and how many."""
    sizes = []
    for field, value in message.ListFields():
        alone = type(message)()
        if field.is_repeated:
            getattr(alone, field.name).MergeFrom(value)
        elif field.message_type is not None:
            getattr(alone, field.name).CopyFrom(value)
        else:
            setattr(alone, field.name, value)
        sizes.append((alone.ByteSize(), field, value))
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
    """Every string of a shadow message with its path; `real` is the true message's descriptor."""
    for field, value in shadow.ListFields():
        true = real.fields_by_name[field.name]
        values = list(value) if field.is_repeated else [value]
        for index, item in enumerate(values):
            path = f"{prefix}{field.name}" + (f"[{index}]" if field.is_repeated else "")
            if field.message_type is not None:
                yield from _text_fields(item, true.message_type, f"{path}.")
            elif true.type == FieldDescriptor.TYPE_STRING:
                yield path, item
