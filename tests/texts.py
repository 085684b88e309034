"""Texts that a peer may send where a name is expected, and what a status that answers them may weigh."""

from __future__ import annotations

import grpc

ALPHABETS = {"ascii": "a", "emoji": "😀", "controls": "\x00\x1b[2J\r\n\x7f", "bidi": "\u202e\u2066\u2028x"}
SIZES = {"9 kB": 9_000, "1 MB": 1_000_000}
STATUS_BYTES = 2048


def text_of(alphabet: str, size: int) -> str:
    """At least `size` bytes of UTF-8."""
    unit = ALPHABETS[alphabet]
    return unit * -(-size // len(unit.encode()))


LONG_TEXTS = {f"{size} {name}": text_of(name, bytes_) for size, bytes_ in SIZES.items() for name in ALPHABETS}


def assert_small(error: grpc.aio.AioRpcError) -> None:
    """The status came whole, is printable and stays far below what gRPC lets trailers take."""
    details = error.details() or ""
    assert details.isprintable()
    assert len(details.encode()) <= STATUS_BYTES
    trailers = dict(error.trailing_metadata() or ())
    assert len(trailers["grpc-status-details-bin"]) <= STATUS_BYTES, "the rich details came too"
