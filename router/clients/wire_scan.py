"""Reads the top of a message's bytes without parsing them: how large each field is, and where its last value lies.

A parser makes objects of all that is in a message before anything can be counted: megabytes of empty submessages become
gigabytes. The scan jumps over each field and stops after `MOST_FIELDS` of them, whatever the bytes are.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

from baton.errors import InvalidArgument

MOST_FIELDS = 1_000
VARINT, FIXED64, LENGTH, GROUP, GROUP_END, FIXED32 = range(6)
_VARINT_BYTES = 10


class Extent(NamedTuple):
    """A half-open range of bytes."""

    start: int
    end: int


class Scan(NamedTuple):
    """`sizes` are bytes by field number, keys and lengths included; `values` the last value of each field that has a
    length, as protobuf takes it. `end` is where the scan stopped: `valid` is False where the bytes make no sense
    there."""

    sizes: Counter[int]
    values: dict[int, Extent]
    end: int
    valid: bool


def scan(data: bytes, start: int = 0, end: int | None = None) -> Scan:
    """Of one message, O(`MOST_FIELDS`). Never raises."""
    end = len(data) if end is None else end
    sizes: Counter[int] = Counter()
    values: dict[int, Extent] = {}
    at = field_start = start
    open_groups: list[int] = []
    try:
        for _ in range(MOST_FIELDS):
            if at >= end:
                break
            field_start = at
            key, at = _varint(data, at, end)
            number, kind = key >> 3, key & 7
            if kind == LENGTH:
                size, at = _varint(data, at, end)
                if not open_groups:
                    values[number] = Extent(at, at + size)
                at += size
            elif kind == VARINT:
                _, at = _varint(data, at, end)
            elif kind == FIXED64:
                at += 8
            elif kind == FIXED32:
                at += 4
            elif kind == GROUP:
                open_groups.append(number)
            elif kind != GROUP_END or not open_groups or open_groups.pop() != number:
                return Scan(sizes, values, field_start, valid=False)
            if at > end:
                values.pop(number, None)
                return Scan(sizes, values, field_start, valid=False)
            # All of a group counts for the outermost one, which is closed when its own end is read.
            sizes[open_groups[0] if open_groups else number] += at - field_start
    except IndexError:
        return Scan(sizes, values, field_start, valid=False)
    return Scan(sizes, values, at, valid=at < end or not open_groups)


def too_large(kind: Any, data: bytes, limit: int) -> InvalidArgument:
    """The refusal of a message of this kind that has more than `limit` bytes. It names the field that takes the most,
    or the field in that; what the scan did not come to counts for that field."""
    name, size = _largest(kind.DESCRIPTOR, data, Extent(0, len(data)))
    taken = f"takes {size} of {len(data)} bytes" if name else f"the request has {len(data)} bytes"
    return InvalidArgument(name, f"{taken}; a request has at most {limit}")


def too_many(kind: Any, data: bytes) -> InvalidArgument:
    """The refusal of a message with more fields than a scan reads."""
    name, _ = _largest(kind.DESCRIPTOR, data, Extent(0, len(data)))
    return InvalidArgument(name, f"the request has more than {MOST_FIELDS} fields at its top")


def _largest(descriptor: Any, data: bytes, where: Extent, deeper: bool = True) -> tuple[str, int]:
    found = scan(data, *where)
    if not found.sizes:
        return "", where.end - where.start
    number, size = found.sizes.most_common(1)[0]
    size += where.end - found.end
    field = descriptor.fields_by_number.get(number)
    if field is None:
        return f"unknown field {number}", size
    value = found.values.get(number)
    if deeper and field.message_type is not None and not field.is_repeated and value is not None:
        inner, inner_size = _largest(field.message_type, data, value, deeper=False)
        if inner and value.end > value.start:
            return f"{field.name}.{inner}", inner_size
    return str(field.name), size


def _varint(data: bytes, at: int, end: int) -> tuple[int, int]:
    """The number and where it ends. Raises IndexError where it has no end."""
    value = shift = 0
    for index in range(at, min(at + _VARINT_BYTES, end)):
        byte = data[index]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, index + 1
        shift += 7
    raise IndexError
