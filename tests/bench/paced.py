"""A server whose pace is known: the tests' double of a cluster. As a program it prints its address and serves.

python -m tests.bench.paced TTFT_MS GAP_MS
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import uvloop

from baton import errors
from baton.rpc.status import abort
from tests.client import double
from tests.client.double import Double, gen, serving

LIMIT_S = 30.0


class Paced(Double):
    """First token `ttft_s` after the request came, the others `gap_s` apart, each at its own time.

    At most `slots` requests are served at once, the others wait; with `refuse_beyond`, one that would make more wait
    is refused. `promise_ms` is told in Accepted.
    """

    def __init__(self, ttft_s: float = 0.02, gap_s: float = 0.002, slots: int = 100_000) -> None:
        super().__init__()
        self.ttft_s, self.gap_s = ttft_s, gap_s
        self.slots = asyncio.Semaphore(slots)
        self.refuse_beyond: int | None = None
        self.promise_ms: float | None = None
        self.under_way = 0

    async def Generate(self, request: gen.GenerateRequest, context: Any) -> AsyncIterator[gen.GenerateResponse]:
        self.requests.append(request)
        if self.error is not None:
            await abort(context, self.error)
        if self.refuse_beyond is not None and self.under_way > self.refuse_beyond:
            await abort(context, errors.ResourceExhausted("too much to do", 1.0, "ttft"))
        self.under_way += 1
        try:
            async for event in self._serve(request):
                yield event
        finally:
            self.under_way -= 1

    async def _serve(self, request: gen.GenerateRequest) -> AsyncIterator[gen.GenerateResponse]:
        begin = asyncio.get_running_loop().time()
        opening = double.accepted()
        if self.promise_ms is not None:
            opening.accepted.predicted_ttft_ms = self.promise_ms
        yield opening
        async with self.slots:
            first = asyncio.get_running_loop().time() + self.ttft_s
            for index in range(request.stopping.max_tokens):
                await _until(first + index * self.gap_s)
                yield double.tokens(index)
            last = asyncio.get_running_loop().time()
        if not self.silent:
            yield self._finished((first - begin) * 1e3, (last - first) * 1e3, request)

    def _finished(self, ttft_ms: float, rest_ms: float, request: gen.GenerateRequest) -> gen.GenerateResponse:
        count = request.stopping.max_tokens
        closing = double.finished()
        closing.finished.reason = gen.FINISH_REASON_LENGTH
        closing.finished.timeline.ttft_ms = ttft_ms
        closing.finished.timeline.tpot_ms = rest_ms / max(1, count - 1)
        closing.finished.usage.output_tokens = count
        closing.finished.ClearField("slo")
        return closing


async def _until(when: float) -> None:
    """Never early."""
    loop = asyncio.get_running_loop()
    while (left := when - loop.time()) > 0:
        await asyncio.sleep(left)


@asynccontextmanager
async def pacing(ttft_ms: float, gap_ms: float) -> AsyncIterator[tuple[str, int]]:
    """The same as a process of its own: its address and its pid."""
    program = (sys.executable, "-m", "tests.bench.paced", str(ttft_ms), str(gap_ms))
    process = await asyncio.create_subprocess_exec(*program, stdout=asyncio.subprocess.PIPE)
    try:
        assert process.stdout is not None
        async with asyncio.timeout(LIMIT_S):
            address = (await process.stdout.readline()).decode().strip()
        yield address, process.pid
    finally:
        process.kill()
        await process.wait()


async def _main(ttft_ms: float, gap_ms: float) -> None:
    async with serving(Paced(ttft_ms / 1e3, gap_ms / 1e3)) as double_:
        print(double_.address, flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(_main(float(sys.argv[1]), float(sys.argv[2])))
