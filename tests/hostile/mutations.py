"""Requests that are almost right: valid ones, changed at the level of the wire.

A message is a list of fields, some of them messages again. Each mutation takes such a tree, or its bytes, and one
random source, so that a seed names a request for good.
"""

from __future__ import annotations

import itertools
import random
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from google.protobuf.message import Message

from baton.v1 import admin_pb2 as admin
from baton.v1 import generation_pb2 as gen

VARINT, FIXED64, LENGTH, START_GROUP, END_GROUP, FIXED32 = range(6)
NUMBERS = (0, 1, 127, 128, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1)
FLOATS = (0.0, -0.0, 1e-45, 1.0, -1.0, 3.4e38, float("inf"), float("-inf"), float("nan"))
TEXTS = (
    b"", b"\x00", b"\xff\xfe", b"\xc3", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", "\u202eevil\u0000".encode(),
    "\U0001f600".encode() * 40, b"{{ messages }}", b"{% for x in range(10**9) %}", b"<|im_end|>", b"\r\n" * 30,
    b"a" * 9000, "é".encode() * 5000,
)  # fmt: skip
GROWN = (2, 2, 3, 17, 17, 129, 129, 1000, 1000, 20_000)
DEEP = (2, 60, 99, 101, 1000)
NESTED_BYTES = 200_000


@dataclass(frozen=True, slots=True)
class Field:
    """One field as it stands on the wire; the value of a LENGTH field is bytes or the fields of a message."""

    number: int
    kind: int
    value: int | bytes | tuple[Field, ...]

    def encoded(self) -> bytes:
        key = varint(self.number << 3 | self.kind)
        if self.kind == VARINT:
            assert isinstance(self.value, int)
            return key + varint(self.value)
        data = encode(self.value) if isinstance(self.value, tuple) else self.value
        assert isinstance(data, bytes)
        return key + (varint(len(data)) + data if self.kind == LENGTH else data)


Tree = tuple[Field, ...]


def varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


def encode(tree: Tree) -> bytes:
    """A field that stands there many times is encoded once."""
    runs = (list(run) for _, run in itertools.groupby(tree, key=id))
    return b"".join(run[0].encoded() * len(run) for run in runs)


def tree_of(message: Message) -> Tree:
    """The fields of a message, in order; a packed list is bytes."""
    fields: list[Field] = []
    for field, value in message.ListFields():
        for one in value if field.is_repeated and not field.is_packed else [value]:
            if field.message_type is not None:
                fields.append(Field(field.number, LENGTH, tree_of(one)))
            elif isinstance(one, str):
                fields.append(Field(field.number, LENGTH, one.encode()))
            elif isinstance(one, float):
                fields.append(Field(field.number, FIXED32, struct.pack("<f", one)))
            elif field.is_packed:
                fields.append(Field(field.number, LENGTH, b"".join(map(varint, one))))
            else:
                fields.append(Field(field.number, VARINT, int(one) & 2**64 - 1))
    return tuple(fields)


def grow(tree: Tree, chance: random.Random) -> Tree:
    """One field many times over."""
    if not tree:
        return tree
    field = chance.choice(tree)
    return (*tree, *(field,) * chance.choice(GROWN))


def lengthen(tree: Tree, chance: random.Random) -> Tree:
    """A text or list many times as long, or another text."""
    places = [index for index, field in enumerate(tree) if isinstance(field.value, bytes) and field.kind == LENGTH]
    if not places:
        return tree
    index = chance.choice(places)
    value = tree[index].value
    assert isinstance(value, bytes)
    longer = chance.choice([*TEXTS, value * chance.choice(GROWN), value + chance.choice(TEXTS)])
    return (*tree[:index], replace(tree[index], value=longer), *tree[index + 1 :])


def renumber(tree: Tree, chance: random.Random) -> Tree:
    """A number becomes one at an edge; a float one that is none."""
    places = [index for index, field in enumerate(tree) if field.kind in (VARINT, FIXED32)]
    if not places:
        return tree
    index = chance.choice(places)
    number: int | bytes = chance.choice(NUMBERS)
    if tree[index].kind == FIXED32:
        number = struct.pack("<f", chance.choice(FLOATS))
    return (*tree[:index], replace(tree[index], value=number), *tree[index + 1 :])


def retype(tree: Tree, chance: random.Random) -> Tree:
    """A field with another wire type than its own."""
    if not tree:
        return tree
    index = chance.randrange(len(tree))
    others: list[tuple[int, int | bytes]] = [
        (VARINT, chance.choice(NUMBERS)),
        (FIXED32, b"\x00\x00\xc0\x7f"),
        (FIXED64, b"\xff" * 8),
        (LENGTH, b"\x08\x01"),
        (START_GROUP, b""),
        (END_GROUP, b""),
        (6, b""),
        (7, b""),
    ]
    kind, value = chance.choice(others)
    return (*tree[:index], Field(tree[index].number, kind, value), *tree[index + 1 :])


def nest(tree: Tree, chance: random.Random) -> Tree:
    """A field that contains the whole message, so many times."""
    number = chance.choice([field.number for field in tree] or [7])
    data = encode(tree)
    for _ in range(chance.choice(DEEP)):
        data = varint(number << 3 | LENGTH) + varint(len(data)) + data
        if len(data) > NESTED_BYTES:
            break
    return (*tree, Field(number, LENGTH, data))


def add_unknown(tree: Tree, chance: random.Random) -> Tree:
    """Fields that no version has, or whose number is at an edge."""
    number = chance.choice([0, 19, 100, 15_000, 19_500, 2**29 - 1])
    return (*tree, *(Field(number, VARINT, chance.choice(NUMBERS)),) * chance.choice(GROWN))


def shuffle(tree: Tree, chance: random.Random) -> Tree:
    return tuple(chance.sample(tree, len(tree)))


def drop(tree: Tree, chance: random.Random) -> Tree:
    return tuple(field for field in tree if chance.random() > 0.3)


def truncate(data: bytes, chance: random.Random) -> bytes:
    return data[: chance.randrange(len(data) + 1)]


def flip(data: bytes, chance: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(min(len(changed), chance.choice([1, 2, 8, 64]))):
        changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def splice(data: bytes, chance: random.Random) -> bytes:
    at = chance.randrange(len(data) + 1)
    return data[:at] + chance.choice([*TEXTS, data, bytes(chance.randrange(64)), b"\xff" * 10]) + data[at:]


TREES: tuple[Callable[[Tree, random.Random], Tree], ...] = (
    grow, lengthen, lengthen, renumber, renumber, retype, nest, add_unknown, shuffle, drop,
)  # fmt: skip
BYTES: tuple[Callable[[bytes, random.Random], bytes], ...] = (truncate, flip, splice)


def mutated(tree: Tree, chance: random.Random) -> Tree:
    """One mutation, somewhere in the tree."""
    inner = [index for index, field in enumerate(tree) if isinstance(field.value, tuple)]
    if inner and chance.random() < 0.5:
        index = chance.choice(inner)
        value = tree[index].value
        assert isinstance(value, tuple)
        return (*tree[:index], replace(tree[index], value=mutated(value, chance)), *tree[index + 1 :])
    return chance.choice(TREES)(tree, chance)


@dataclass(frozen=True, slots=True)
class Call:
    """`service` and `method` as in the path of a call."""

    service: str
    method: str
    data: bytes
    streams: bool = False


def _valid(chance: random.Random) -> tuple[str, str, Message, bool]:
    """A request that is served."""
    chat = gen.Chat(messages=[gen.ChatMessage(role=role, content="hello") for role in ("system", "user")])
    inputs: Sequence[dict[str, object]] = (
        {"prompt": "once upon a time"},
        {"token_ids": gen.TokenIds(ids=[1, 2, 3, 200])},
        {"chat": chat},
    )
    given = chance.choice(inputs)
    name = chance.choice(["Generate"] * 6 + ["Tokenize"] * 2 + ["ListModels", "Explain"])
    if name == "Tokenize":
        only = {key: value for key, value in given.items() if key != "token_ids"} or {"prompt": "hello"}
        return "Generation", name, gen.TokenizeRequest(**only), False  # type: ignore[arg-type]
    if name == "ListModels":
        return "Generation", name, gen.ListModelsRequest(), False
    if name == "Explain":
        return "Admin", name, admin.ExplainRequest(request_id="some", tenant_salt="one"), False
    request = gen.GenerateRequest(
        tenant_salt=chance.choice(["", "one", "other"]),
        sampling=gen.Sampling(temperature=0.5, top_k=9, top_p=0.9, min_p=0.1, seed=7, repetition_penalty=1.1),
        stopping=gen.Stopping(max_tokens=2, stop=["END", "\n\n"], stop_token_ids=[3, 4], ignore_eos=True),
        logprobs=chance.choice([0, 3]),
        slo=gen.Slo(ttft_ms=500, tpot_ms=50),
        priority=chance.choice([-3, 0, 5]),
        when_unmet=gen.UNMET_POLICY_REFUSE,
        **given,  # type: ignore[arg-type]
    )
    return "Generation", name, request, True


def call_of(seed: int) -> Call:
    """The request of this number, after one to four mutations; some stay as they are."""
    chance = random.Random(seed)
    service, method, message, streams = _valid(chance)
    tree = tree_of(message)
    for _ in range(chance.choice([0, 1, 1, 2, 3])):
        tree = mutated(tree, chance)
    data = encode(tree)
    if chance.random() < 0.4:
        data = chance.choice(BYTES)(data, chance)
    return Call(service, method, data, streams)
