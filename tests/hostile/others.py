"""Those who are served meanwhile: streams and health checks, and how long they wait."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator

from baton.client.types import Tokens
from tests.cluster.conftest import Running

STREAMS, STREAM_TOKENS = 10, 400
HEALTH_EVERY_S = 0.02


class Others:
    """Streams and health checks; `gaps` between a stream's token events and `waits` for a health check's answer, in
    seconds."""

    def __init__(self, cluster: Running) -> None:
        self._cluster = cluster
        self.gaps: list[float] = []
        self.waits: list[float] = []

    @contextlib.asynccontextmanager
    async def busy(self) -> AsyncIterator[None]:
        """They run inside the block."""
        tasks = [asyncio.create_task(self._stream(number)) for number in range(STREAMS)]
        tasks.append(asyncio.create_task(self._check()))
        try:
            yield
            for task in tasks:
                assert not task.done(), "nobody else's call may fail"
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _stream(self, number: int) -> None:
        for turn in itertools.count():
            last = None
            call = self._cluster.client.generate(
                token_ids=[3 + number, 5 + turn % 200, 7], max_tokens=STREAM_TOKENS, ignore_eos=True, timeout=120
            )
            async for event in call:
                if not isinstance(event, Tokens):
                    continue
                now = time.monotonic()
                if last is not None:
                    self.gaps.append(now - last)
                last = now

    async def _check(self) -> None:
        while True:
            started = time.monotonic()
            await self._cluster.client.health("liveness")
            self.waits.append(time.monotonic() - started)
            await asyncio.sleep(HEALTH_EVERY_S)


def p99_ms(seconds: list[float]) -> float:
    return sorted(seconds)[int(0.99 * len(seconds))] * 1e3
