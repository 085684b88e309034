"""Runs the real command line as a process and collects what it says."""

from __future__ import annotations

import asyncio
import os
import sys
from asyncio.subprocess import PIPE
from dataclasses import dataclass

COMMAND = (sys.executable, "-m", "baton.cli")
LIMIT_S = 60.0


@dataclass(frozen=True)
class Result:
    """How a command ended."""

    status: int
    out: str
    err: str

    @property
    def error_line(self) -> str:
        """The one line on stderr; fails the test when there are more or none."""
        (line,) = self.err.splitlines()
        assert line.startswith("baton: ")
        return line.removeprefix("baton: ")


def environment(**extra: str) -> dict[str, str]:
    """Without what would change a command's defaults."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("BATON_")}
    return {**kept, "COLUMNS": "100", **extra}


async def baton(*arguments: str | bytes, stdin: bytes = b"", **extra: str) -> Result:
    """Runs `baton ARGUMENTS` to its end; `extra` goes to its environment."""
    process = await asyncio.create_subprocess_exec(
        *COMMAND, *arguments, stdin=PIPE, stdout=PIPE, stderr=PIPE, env=environment(**extra)
    )
    try:
        async with asyncio.timeout(LIMIT_S):
            out, err = await process.communicate(stdin)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode is not None
    return Result(process.returncode, out.decode(), err.decode())
