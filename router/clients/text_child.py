"""The process for long texts: parses, checks, renders and tokenises one request at a time, at low priority.

`python -P -m router.clients.text_child PARENT_PID DESCRIPTOR` reads frames from a socket and answers each. It ends with
the router, which is its parent.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import sys
import traceback
from io import BufferedRWPair

from baton.children import die_with_parent
from baton.errors import BatonError
from router.clients.preparation import TextModel, answer_tokenize, prepare
from router.clients.text_frames import HEAD, KEY, FrameKind, pack_error, unpack_loading

NICE = 10
"""Further back than the arithmetic of workers: a long text can wait, tokens of others can't."""
TRACEBACK_CHARACTERS = 4_000
TRIM_BYTES = 256 * 1024
"""After a text of this size the allocator gives back what it kept: a text takes some 200 times its own size."""


def serve(stream: BufferedRWPair) -> None:
    """Until the other end closes."""
    models: dict[int, TextModel] = {}
    while head := stream.read(HEAD.size):
        kind, size = HEAD.unpack(head)
        answer, body = _answer(models, kind, stream.read(size))
        stream.write(HEAD.pack(answer, len(body)))
        stream.write(body)
        stream.flush()
        del body
        if size >= TRIM_BYTES:
            _trim()


def _answer(models: dict[int, TextModel], kind: int, body: bytes) -> tuple[FrameKind, bytes]:
    try:
        if kind == FrameKind.LOAD:
            loading = unpack_loading(body)
            models.pop(loading.forget or 0, None)
            models[loading.key] = loading.model
            return FrameKind.DONE, b""
        work = prepare if kind == FrameKind.GENERATE else answer_tokenize
        return FrameKind.DONE, work(body[KEY.size :], models[KEY.unpack_from(body)[0]])
    except BatonError as error:
        return FrameKind.REFUSED, pack_error(error)
    except Exception:  # noqa: BLE001 (the router logs it)
        return FrameKind.FAILED, traceback.format_exc()[-TRACEBACK_CHARACTERS:].encode(errors="replace")


def _trim() -> None:
    with contextlib.suppress(AttributeError):  # a C library other than glibc
        ctypes.CDLL(None).malloc_trim(0)


def main() -> None:
    parent, descriptor = map(int, sys.argv[1:3])
    die_with_parent(parent)
    os.nice(NICE)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # they may reach the whole group; the router ends this process itself
    with socket.socket(fileno=descriptor) as link, link.makefile("rwb") as stream:
        serve(stream)


if __name__ == "__main__":
    main()
