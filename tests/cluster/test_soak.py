"""Endurance: 10,000 short requests of every kind through one worker of each role. `make soak`; minutes.

Memory must be flat after the first 1,000 and the last 1,000 as fast as the first.
"""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from baton.client.types import Accepted, Tokens
from baton.config import RouterConfig
from baton.errors import InvalidArgument
from tests.cluster.conftest import VOCABULARY, Running, idle_counts, no_growth, running

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(3600)]

REQUESTS = 10_000
WINDOW = REQUESTS // 10
AT_ONCE = 24
PREFIXES = 40
GROWTH_BYTES = 6_000_000
"""What a process may grow by from the first window's end to the last's. Workers remember ended attempts for minutes, at
0.2 kB or so each: 2 MB that come back. A leaked request (ids, protobuf, tasks) is more than 2 kB, so 18 MB."""
EXPLAINED_BYTES = 1_600 * (RouterConfig.explained_requests - WINDOW)
"""What a router keeps of the last requests to explain them, as far as the first window has not filled it."""
CPU_TOLERANCE = 1.15
"""Of CPU seconds, all processes together: what other programs do to the clock does not count."""
WALL_TOLERANCE = 1.5


@dataclass(frozen=True, slots=True)
class Mark:
    """After so many requests."""

    requests: int
    wall: float
    cpu: float
    bytes: dict[str, int]
    """Resident and anonymous, by process: heap, stacks, weights. The pool is shared memory, resident from the start."""


@dataclass(slots=True)
class Soak:
    """Draws the requests, one after the other, and takes a mark after every half window."""

    cluster: Running
    draw: random.Random = field(default_factory=lambda: random.Random(1))
    begun: int = 0
    ended: int = 0
    marks: list[Mark] = field(default_factory=list)
    outcomes: dict[str, int] = field(default_factory=dict)

    async def run(self) -> None:
        """All of them, `AT_ONCE` at any time."""
        prefixes = [self.tokens(self.draw.randrange(16, 129)) for _ in range(PREFIXES)]
        self.mark()
        async with asyncio.TaskGroup() as group:
            for _ in range(AT_ONCE):
                group.create_task(self._client(prefixes))

    def tokens(self, count: int) -> list[int]:
        return [self.draw.randrange(100, VOCABULARY) for _ in range(count)]

    async def _client(self, prefixes: list[list[int]]) -> None:
        while self.begun < REQUESTS:
            self.begun += 1
            length = round(5 * 40 ** (self.draw.random() ** 2))  # 5 to 200, most of them short
            prompt = self.tokens(length)
            if self.draw.random() < 0.7:
                prompt = (self.draw.choice(prefixes) + prompt)[: max(length, 17)]
            kind = self.draw.choices(("whole", "left", "cancelled", "refused"), (82, 6, 6, 6))[0]
            await getattr(self, kind)(prompt, self._options())
            self.outcomes[kind] = self.outcomes.get(kind, 0) + 1
            self.ended += 1
            if self.ended % (WINDOW // 2) == 0:
                self.mark()

    def _options(self) -> dict[str, Any]:
        sampled = {"temperature": 0.8, "top_p": 0.9, "seed": self.draw.randrange(2**32)}
        options: dict[str, Any] = self.draw.choice(({"temperature": 0.0}, sampled, {"temperature": 0.0, "logprobs": 3}))
        if self.draw.random() < 0.1:
            options["tenant_salt"] = f"tenant {self.draw.randrange(5)}"
        return options | {"max_tokens": self.draw.randrange(1, 17), "ignore_eos": True, "timeout": 120}

    async def whole(self, prompt: list[int], options: dict[str, Any]) -> None:
        completion = await self.cluster.client.complete(token_ids=prompt, **options)
        assert len(completion.token_ids) == options["max_tokens"]

    async def left(self, prompt: list[int], options: dict[str, Any]) -> None:
        """As soon as it is accepted."""
        await self._leave(prompt, options, Accepted)

    async def cancelled(self, prompt: list[int], options: dict[str, Any]) -> None:
        """In the middle of its tokens."""
        await self._leave(prompt, options | {"max_tokens": 60}, Tokens)

    async def _leave(self, prompt: list[int], options: dict[str, Any], at: type[object]) -> None:
        events = self.cluster.client.generate(token_ids=prompt, **options)
        async for event in events:
            if isinstance(event, at):
                break
        await events.aclose()

    async def refused(self, prompt: list[int], options: dict[str, Any]) -> None:
        wrong = self.draw.choice(({"top_p": 2.0}, {"max_tokens": 100_000}, {"stop": [""]}))
        with pytest.raises(InvalidArgument):
            await self.cluster.client.complete(token_ids=prompt, **(options | wrong))

    def mark(self) -> None:
        found, cpu = {}, 0.0
        for child in self.cluster.cluster.processes:
            found[child.name] = _private(child.pid)
            times = psutil.Process(child.pid).cpu_times()
            cpu += times.user + times.system
        self.marks.append(Mark(self.ended, time.monotonic(), cpu, found))


def _private(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("RssAnon:"))
    return int(line.split()[1]) * 1024


@pytest.mark.asyncio
async def test_memory_stays_flat_and_nothing_slows_down() -> None:
    async with running(prefill=1, decode=1) as cluster:
        soak = Soak(cluster)
        await soak.whole(soak.tokens(40), {"max_tokens": 4, "ignore_eos": True, "timeout": 120})
        before = await idle_counts(cluster)
        await soak.run()
        show(soak)
        await no_growth(cluster, {name: counts | {"threads": counts["threads"] + 2} for name, counts in before.items()})
    by_count = {mark.requests: mark for mark in soak.marks}
    start, first, last = by_count[0], by_count[WINDOW], by_count[REQUESTS]
    before_last = by_count[REQUESTS - WINDOW]
    growth = {name: size - first.bytes[name] for name, size in last.bytes.items()}
    growth["router"] -= EXPLAINED_BYTES
    assert all(grown <= GROWTH_BYTES for grown in growth.values()), growth
    assert last.cpu - before_last.cpu <= CPU_TOLERANCE * (first.cpu - start.cpu)
    assert last.wall - before_last.wall <= WALL_TOLERANCE * (first.wall - start.wall)


def show(soak: Soak) -> None:
    """The figures, for `make soak`."""
    print(f"\n{soak.outcomes}")
    for former, mark in zip(soak.marks, soak.marks[1:], strict=False):
        sizes = ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in mark.bytes.items())
        rate = (mark.requests - former.requests) / (mark.wall - former.wall)
        cpu_ms = (mark.cpu - former.cpu) / (mark.requests - former.requests) * 1e3
        print(f"{mark.requests:>6} requests: {rate:6.1f}/s, {cpu_ms:6.2f} ms of CPU each; {sizes}")
