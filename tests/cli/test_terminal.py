"""`baton chat` on a terminal: a pseudo-terminal stands for the person's."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pty
import signal
from collections.abc import AsyncIterator

import pytest_asyncio

from tests.cli.runner import COMMAND, LIMIT_S, environment
from tests.client.double import Double, serving


class Terminal:
    """What a person sees and types."""

    def __init__(self) -> None:
        self.ours, self.theirs = pty.openpty()
        self.seen = ""
        self._grown = asyncio.Event()
        asyncio.get_running_loop().add_reader(self.ours, self._read)

    def _read(self) -> None:
        self.seen += os.read(self.ours, 65536).decode(errors="replace")
        self._grown.set()

    async def until(self, text: str, times: int = 1) -> None:
        """Waits until that has appeared so many times."""
        while self.seen.count(text) < times:
            self._grown.clear()
            await self._grown.wait()

    def type(self, text: str) -> None:
        """As from the keyboard."""
        os.write(self.ours, text.encode())

    def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self.ours)
        os.close(self.ours)
        os.close(self.theirs)


@pytest_asyncio.fixture
async def terminal() -> AsyncIterator[Terminal]:
    made = Terminal()
    yield made
    made.close()


async def interrupt_prompt(process: asyncio.subprocess.Process, terminal: Terminal) -> None:
    """Ctrl-C at the prompt, as often as it takes: what comes before readline waits for a key, it sees only then."""
    while "Ctrl-D ends." not in terminal.seen:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1):
                await terminal.until("Ctrl-D ends.")


async def talk(process: asyncio.subprocess.Process, terminal: Terminal, double: Double) -> None:
    await terminal.until("> ")
    await interrupt_prompt(process, terminal)
    terminal.type("hi\n")
    await terminal.until("France")
    process.send_signal(signal.SIGINT)
    await double.cancelled.wait()
    await terminal.until("(cancelled)")
    double.endless = False
    terminal.type("and now\n")
    await terminal.until("is Paris.\r\n> ")
    terminal.type("\x04")
    assert await process.wait() == 0


async def test_ctrl_c_cancels_an_answer_and_ctrl_d_ends(terminal: Terminal) -> None:
    async with serving(Double()) as double:
        double.endless = True
        tty = terminal.theirs
        process = await asyncio.create_subprocess_exec(
            *COMMAND,
            "chat",
            "--server",
            double.address,
            stdin=tty,
            stdout=tty,
            stderr=tty,
            env=environment(TERM="dumb"),
        )
        try:
            async with asyncio.timeout(LIMIT_S):
                await talk(process, terminal, double)
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
    assert [entry.role for entry in double.requests[1].chat.messages] == ["user", "assistant", "user"]
    assert "Traceback" not in terminal.seen
