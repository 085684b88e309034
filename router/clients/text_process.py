"""The process for long texts, as the router sees it: started when it is first asked, ended by a kill."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
from collections import OrderedDict
from typing import NamedTuple

from baton.children import PYTHON, child_environment
from baton.telemetry import Counts
from router.clients.preparation import TextModel
from router.clients.text_frames import HEAD, KEY, FrameKind, Loading, pack_loading
from router.text.tokenisation import Language

MODULE = "router.clients.text_child"
MOST_MODELS = 8
"""Tokenisers kept by the process; each takes some tens of megabytes."""
END_S, REAP_S = 5.0, 0.1
_CHUNK_BYTES = 64 * 1024


class _Link(NamedTuple):
    process: subprocess.Popen[bytes]
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter


class TextProcess:
    """For one caller at a time. After an exception or a cancel of `ask` it must be killed; the next `ask` starts it
    again."""

    def __init__(self, counts: Counts) -> None:
        self._counts = counts
        self._link: _Link | None = None
        self._keys: OrderedDict[Language, int] = OrderedDict()
        self._last_key = 0

    @property
    def pid(self) -> int | None:
        """None while none runs."""
        return None if self._link is None or self._link.process.poll() is not None else self._link.process.pid

    async def ask(self, kind: FrameKind, model: TextModel, data: bytes) -> tuple[FrameKind, bytes]:
        """Its answer to a text. Raises OSError where it can't be started, and OSError or EOFError where it ends."""
        if self.pid is None:
            await self.kill()
            self._counts.add("text_process_starts")
            self._link = await _start()
        assert self._link is not None, "it runs"
        key = await self._load(self._link, model)
        return await _exchange(self._link, kind, KEY.pack(key), data)

    async def kill(self) -> None:
        """Ends it, if there is one, and waits for its end, `END_S` at most."""
        link, self._link = self._link, None
        self._keys.clear()
        if link is None:
            return
        link.process.kill()
        try:
            with contextlib.suppress(OSError):
                async with asyncio.timeout(END_S):
                    while await link.reader.read(_CHUNK_BYTES):
                        pass
        finally:
            _reap(link)

    async def _load(self, link: _Link, model: TextModel) -> int:
        key = self._keys.get(model.language)
        if key is not None:
            self._keys.move_to_end(model.language)
            return key
        forget = self._keys.popitem(last=False)[1] if len(self._keys) >= MOST_MODELS else None
        self._last_key = key = self._last_key + 1
        kind, body = await _exchange(link, FrameKind.LOAD, pack_loading(Loading(key, forget, model)))
        if kind is not FrameKind.DONE:
            raise OSError(f"the model can't be loaded: {body.decode(errors='replace')}")
        self._keys[model.language] = key
        return key


async def _start() -> _Link:
    ours, theirs = socket.socketpair()
    with theirs:
        try:
            process = _spawn(theirs.fileno())
        except BaseException:
            ours.close()
            raise
    ours.setblocking(False)
    reader, writer = await asyncio.open_connection(sock=ours)
    return _Link(process, reader, writer)


def _reap(link: _Link) -> None:
    """At once: by the end of its socket a process has given its memory back."""
    link.writer.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        link.process.wait(REAP_S)


def _spawn(descriptor: int) -> subprocess.Popen[bytes]:
    """Some milliseconds. Not by the event loop: uvloop forks and runs Python before the new program, in which gRPC's
    handlers may crash; this way is a vfork."""
    command = (*PYTHON, MODULE, str(os.getpid()), str(descriptor))
    null = subprocess.DEVNULL
    return subprocess.Popen(command, stdin=null, stdout=null, env=child_environment(), pass_fds=(descriptor,))


async def _exchange(link: _Link, kind: FrameKind, *parts: bytes) -> tuple[FrameKind, bytes]:
    """In chunks: the event loop never waits for the process, nor copies megabytes at once."""
    link.writer.write(HEAD.pack(kind, sum(map(len, parts))))
    for part in parts:
        for start in range(0, len(part), _CHUNK_BYTES):
            link.writer.write(memoryview(part)[start : start + _CHUNK_BYTES])
            await link.writer.drain()
    answer, size = HEAD.unpack(await link.reader.readexactly(HEAD.size))
    return FrameKind(answer), await link.reader.readexactly(size)
