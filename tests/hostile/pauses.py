"""Processes that are suspended under load, and go on."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from baton.client import Client
from baton.client.types import Finished, Tokens
from baton.launch.child import Child
from tests.cluster.conftest import Running

STREAM_S = 180.0
BETWEEN_S = 0.3


@asynccontextmanager
async def suspended(children: Sequence[Child]) -> AsyncIterator[None]:
    """All are stopped in the block, and go on after it."""
    for child in children:
        os.kill(child.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for child in reversed(children):
            os.kill(child.pid, signal.SIGCONT)


@asynccontextmanager
async def frozen_client(address: str) -> AsyncIterator[None]:
    """A client process that is suspended in the middle of a stream; killed after the block."""
    command = (sys.executable, "-m", "baton.cli", "generate", "--server", address, "--raw", "hello")
    options = ("--max-tokens", "4000", "--ignore-eos")
    client = await asyncio.create_subprocess_exec(*command, *options, stdout=PIPE, stderr=DEVNULL)
    assert client.stdout is not None
    try:
        async with asyncio.timeout(STREAM_S):
            assert await client.stdout.read(1), "the client ended"
        client.send_signal(signal.SIGSTOP)
        yield
    finally:
        if client.returncode is None:
            client.kill()
        await client.wait()


class Stream:
    """One request that asks for `tokens` tokens; `gaps` are the seconds between two events of tokens."""

    def __init__(self, client: Client, seed: int, tokens: int) -> None:
        self.positions: list[int] = []
        self.tokens = tokens
        self.gaps: list[float] = []
        self.seed = seed
        self._client = client
        self.task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        prompt = [self.seed % 251, *range(1, 32)]
        last = time.monotonic()
        events = self._client.generate(
            token_ids=prompt, seed=self.seed, max_tokens=self.tokens, ignore_eos=True, timeout=STREAM_S
        )
        async for event in events:
            if isinstance(event, Tokens):
                now = time.monotonic()
                self.gaps.append(now - last)
                last = now
                self.positions += range(event.position, event.position + len(event.ids))
            if isinstance(event, Finished):
                assert self.positions == [*range(len(prompt), len(prompt) + self.tokens)], "each token once, in order"
                return
        raise AssertionError("the stream ended without a word")

    @property
    def under_way(self) -> bool:
        return len(self.positions) > 0 and not self.task.done()


async def streams_through(
    cluster: Running, pauses: Sequence[tuple[Sequence[Child], float]], *, count: int, tokens: int
) -> list[BaseException]:
    """Suspends processes, each group for so many seconds and one group after the other, while `count` streams run.
    Returns the errors of streams that were lost."""
    streams = [Stream(cluster.client, seed, tokens) for seed in range(count)]
    async with asyncio.timeout(STREAM_S):
        while not all(stream.under_way for stream in streams):
            early = [stream for stream in streams if stream.task.done()]
            assert not early, "the streams are too short to be paused"
            await asyncio.sleep(0.02)
        for children, seconds in pauses:
            async with suspended(children):
                await asyncio.sleep(seconds)
            await asyncio.sleep(BETWEEN_S)
        ends = await asyncio.gather(*(stream.task for stream in streams), return_exceptions=True)
    return [end for end in ends if isinstance(end, BaseException)]
