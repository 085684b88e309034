"""One child process of a local cluster: started, ready, exited.

Its output is read to the end, so that it never blocks on a full pipe. Each line goes to a sink; the last ones are kept,
to describe its end.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
from asyncio.subprocess import DEVNULL, PIPE, STDOUT
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple

from baton.errors import ConfigError, Unavailable

Sink = Callable[[str], None]
"""Takes one line without its newline; must not block for long."""
USAGE_STATUS = 2
LINE_LIMIT_BYTES = 64 * 1024
LAST_LINES = 50
DRAIN_S = 1.0
FATAL = "baton: "
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


class _Pipe(NamedTuple):
    transport: asyncio.ReadTransport
    reader: asyncio.StreamReader


class Child:
    """A running process, made by `start`. The caller must end it, with `terminate` or `kill`."""

    def __init__(self, name: str, role: str, process: asyncio.subprocess.Process, ready: _Pipe, sink: Sink) -> None:
        self.name, self.role = name, role
        self.address = ""
        self._process, self._ready, self._sink = process, ready, sink
        self._said: deque[str] = deque(maxlen=LAST_LINES)
        self._reading = asyncio.create_task(self._read_output(), name=f"output of {name}")

    @classmethod
    async def start(
        cls, name: str, role: str, command: Sequence[str], environment: Mapping[str, str], sink: Sink
    ) -> Child:
        """Appends `--ready-fd N` to the command. The process leaves our process group itself (`leave_terminal`)."""
        read_end, write_end = os.pipe()
        ready = await _open_pipe(read_end)
        try:
            process = await asyncio.create_subprocess_exec(
                *command,
                f"--ready-fd={write_end}",
                stdin=DEVNULL,
                stdout=PIPE,
                stderr=STDOUT,
                env=dict(environment),
                pass_fds=(write_end,),
            )
        except BaseException:
            ready.transport.close()
            raise
        finally:
            os.close(write_end)
        return cls(name, role, process, ready, sink)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process.returncode is None

    async def wait_ready(self) -> str:
        """Its address, once it says so. Raises when it exits first: ConfigError for status 2, else Unavailable."""
        line = await self._ready.reader.readline()
        if not line.endswith(b"\n"):
            kind = ConfigError if await self.wait_exited() == USAGE_STATUS else Unavailable
            raise kind(f"{self.name}: {self.describe_exit()}")
        self.address = line.decode().strip()
        return self.address

    async def wait_exited(self) -> int:
        """Its exit status (negative for a signal), after its last lines have been read."""
        status = await self._process.wait()
        # Bounded: a process that it started itself may hold its output open.
        await asyncio.wait([self._reading], timeout=DRAIN_S)
        self._reading.cancel()
        self._ready.transport.close()
        return status

    def terminate(self) -> None:
        """Asks it to stop; does nothing once it has exited."""
        with suppress(ProcessLookupError):
            self._process.terminate()

    def kill(self) -> None:
        """Ends it at once; does nothing once it has exited."""
        with suppress(ProcessLookupError):
            self._process.kill()

    def describe_exit(self) -> str:
        """The signal that killed it, else its line with the fatal error, else its last line."""
        status = self._process.returncode
        assert status is not None, "it has exited"
        if status < 0:
            return f"was killed by {signal.Signals(-status).name}"
        fatal = [line.removeprefix(FATAL) for line in self._said if line.startswith(FATAL)]
        return (fatal or self._said or [f"ended with status {status}"])[-1]

    async def _read_output(self) -> None:
        assert self._process.stdout is not None
        pending = b""
        while piece := await self._process.stdout.read(LINE_LIMIT_BYTES):
            *lines, pending = (pending + piece).split(b"\n")
            if len(pending) >= LINE_LIMIT_BYTES:
                lines, pending = [*lines, pending], b""
            for line in lines:
                self._take(line)
        if pending:
            self._take(pending)

    def _take(self, raw: bytes) -> None:
        line = raw.decode(errors="replace").rstrip()
        if not line:
            return
        self._said.append(_COLOUR.sub("", line))
        # Before it is ready, `wait_ready` raises the fatal line.
        if self.address or not line.startswith(FATAL):
            self._sink(f"({self.name}) {line}")


async def _open_pipe(descriptor: int) -> _Pipe:
    """Owns the descriptor."""
    reader = asyncio.StreamReader()
    pipe = os.fdopen(descriptor, "rb", buffering=0)
    loop = asyncio.get_running_loop()
    transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), pipe)
    return _Pipe(transport, reader)
