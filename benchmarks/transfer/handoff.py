"""What the handoff costs: `make bench-handoff`.

An idle 1+1 for each of shm and tcp, taking turns with fresh prompts. The prefill worker, the router and this client
share the first core; the decode worker has the last. The gap from the first token to the second is set against a decode
step of the same stream, the time to the first token against a request of one token, which has no handoff, and the step
of a sequence that decodes while 4,096 tokens come in against the same sequence alone.

Beside it: how long this process takes to touch as much memory of its own, left alone for as long. A virtual machine's
host may take away what is idle, or let it grow cold; then a decode worker's first step after a pause is slower than its
others, whoever wrote the blocks.
"""

from __future__ import annotations

import asyncio
import mmap
import os
import random
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

from baton.client import Client
from baton.client.types import Finished, Timeline, Tokens
from baton.config import TransportChoice
from baton.launch.cluster import ClusterConfig, LocalCluster
from benchmarks.report import Row, publish, spread

VOCABULARY = 49_152
ROUNDS = {256: 20, 1024: 8, 4096: 4}
OUTPUT = 12
GAP_MS: dict[str, tuple[float, float]] = {"shm": (5.0, 15.0), "tcp": (10.0, 25.0)}
"""(median, p99) that the first gap may exceed a step by."""
TTFT_RATIO, STEP_RATIO = 1.03, 1.15
KV_BYTES = 23_040
"""Of a token of the embedded model."""
BESIDE = 100
"""Output tokens of the sequence that decodes meanwhile: fewer than 4,096 tokens take to come in."""


@dataclass(slots=True)
class Found:
    """One transport's figures, in ms."""

    excess: dict[int, list[float]] = field(default_factory=dict)
    step: dict[int, list[float]] = field(default_factory=dict)
    with_handoff: dict[int, list[float]] = field(default_factory=dict)
    without: dict[int, list[float]] = field(default_factory=dict)
    exposed: dict[int, list[float]] = field(default_factory=dict)
    alone: list[float] = field(default_factory=list)
    beside: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Streamed:
    """When tokens came, in ms from the request, and what the router says of it."""

    at: list[float]
    timeline: Timeline

    @property
    def gaps(self) -> list[float]:
        return [later - earlier for earlier, later in zip(self.at, self.at[1:], strict=False)]


class Pause:
    """Memory in ordinary pages that nobody else uses, and the times it took to touch some of it."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, KV_BYTES * max(ROUNDS), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._memory.madvise(mmap.MADV_NOHUGEPAGE)
        self._memory.write(bytes(len(self._memory)))
        self.touched: dict[int, list[float]] = {}
        """By tokens, in ms."""

    def touch(self, tokens: int) -> None:
        """As many pages as the KV of so many tokens."""
        started = time.perf_counter()
        memoryview(self._memory)[: KV_BYTES * tokens : mmap.PAGESIZE].tobytes()
        self.touched.setdefault(tokens, []).append((time.perf_counter() - started) * 1e3)

    def rows(self) -> list[Row]:
        """The longest times, and their spread."""
        return [
            Row(f"{tokens:,} tokens: touching as much idle memory, longest", "ms", max(times), "", None, False,
                spread=spread(times))
            for tokens, times in self.touched.items()
        ]  # fmt: skip


def prompt(tokens: int, generator: random.Random) -> list[int]:
    return [generator.randrange(100, VOCABULARY) for _ in range(tokens)]


async def stream(client: Client, tokens: list[int], output: int) -> Streamed:
    started = time.perf_counter()
    at: list[float] = []
    timeline: Timeline | None = None
    options = client.generate(token_ids=tokens, temperature=0.0, max_tokens=output, ignore_eos=True, timeout=120)
    async for event in options:
        if isinstance(event, Tokens):
            at += [(time.perf_counter() - started) * 1e3] * len(event.ids)
        elif isinstance(event, Finished):
            timeline = event.timeline
    assert timeline is not None
    assert len(at) == output
    return Streamed(at, timeline)


async def once(client: Client, found: Found, tokens: int, generator: random.Random) -> None:
    """One prompt without a handoff, another with one."""
    short = await stream(client, prompt(tokens, generator), 1)
    whole = await stream(client, prompt(tokens, generator), OUTPUT)
    step = statistics.median(whole.gaps[1:])
    exposed = whole.timeline.transfer_exposed_ms or 0.0
    for figures, value in (
        (found.without, short.at[0]),
        (found.with_handoff, whole.at[0]),
        (found.excess, whole.gaps[0] - step),
        (found.step, step),
        (found.exposed, exposed),
    ):
        figures.setdefault(tokens, []).append(value)


async def disturbed(client: Client, found: Found, generator: random.Random) -> None:
    """A sequence decodes alone, and then one like it while 4,096 tokens are computed and come in."""
    alone = await stream(client, prompt(100, generator), BESIDE)
    coming = asyncio.create_task(stream(client, prompt(4096, generator), 2))
    beside = await stream(client, prompt(100, generator), BESIDE)
    if coming.done():
        raise AssertionError("the long prompt was over before the sequence beside it")
    await coming
    for figures, run in ((found.alone, alone), (found.beside, beside)):
        assert run.timeline.decode_ms is not None
        figures.append(run.timeline.decode_ms / (BESIDE - 1))


def stay_on(pid: int, cpu: int) -> None:
    """All threads of a process, now; those to come inherit it."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(ProcessLookupError):
            os.sched_setaffinity(int(task.name), {cpu})


async def measure(rounds: dict[int, int], pause: Pause) -> dict[TransportChoice, Found]:
    generator = random.Random(3)
    found: dict[TransportChoice, Found] = {"shm": Found(), "tcp": Found()}
    async with AsyncExitStack() as stack:
        clients = {}
        for transport in found:
            config = ClusterConfig(listen="127.0.0.1:0", pin=True, transport=transport)
            cluster = await stack.enter_async_context(LocalCluster(config))
            clients[transport] = await stack.enter_async_context(Client(cluster.address))
            stay_on(cluster.processes[0].pid, min(os.sched_getaffinity(0)))
        stay_on(os.getpid(), min(os.sched_getaffinity(0)))
        for client in clients.values():  # what is only slow once
            await once(client, Found(), 1024, generator)
        for tokens, count in rounds.items():
            for _ in range(count):
                for transport, client in clients.items():
                    await once(client, found[transport], tokens, generator)
                pause.touch(tokens)
        for _ in range(max(1, rounds[4096] // 2)):
            for transport, client in clients.items():
                await disturbed(client, found[transport], generator)
    return found


def rows(found: dict[TransportChoice, Found]) -> list[Row]:
    made = []
    for transport, figures in found.items():
        median_ms, worst_ms = GAP_MS[transport]
        for tokens, excess in figures.excess.items():
            case, step = f"{transport}, {tokens:,} tokens", statistics.median(figures.step[tokens])
            middle, last = statistics.median(excess), percentile(excess, 0.99)
            ttft, bare = statistics.median(figures.with_handoff[tokens]), statistics.median(figures.without[tokens])
            exposed = figures.exposed[tokens]
            made += [
                Row(f"{case}: first gap", "ms", middle + step, "a step", step, False,
                    f"a step + {median_ms:g} ms", middle <= median_ms, spread([value + step for value in excess])),
                Row(f"{case}: first gap, p99", "ms", last + step, "a step", step, False,
                    f"a step + {worst_ms:g} ms", last <= worst_ms),
                Row(f"{case}: TTFT", "ms", ttft, "max_tokens 1", bare, False,
                    f"at most {TTFT_RATIO} x", ttft <= TTFT_RATIO * bare, spread(figures.with_handoff[tokens])),
                Row(f"{case}: transfer not hidden", "ms", statistics.median(exposed), "", None, False,
                    spread=spread(exposed)),
            ]  # fmt: skip
        beside, alone = statistics.median(figures.beside), statistics.median(figures.alone)
        made.append(
            Row(f"{transport}: step while 4,096 tokens come in", "ms", beside, "alone", alone, False,
                f"at most {STEP_RATIO} x", beside <= STEP_RATIO * alone, spread(figures.beside))
        )  # fmt: skip
    return made


def percentile(values: Sequence[float], share: float) -> float:
    """The least value that `share` of them do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def main() -> None:
    scale = float(sys.argv[1]) if len(sys.argv) > 1 else 1.0
    rounds = {tokens: max(2, round(count * scale)) for tokens, count in ROUNDS.items()}
    pause = Pause()
    found = asyncio.run(measure(rounds, pause))
    sys.exit(0 if publish("handoff", rows(found) + pause.rows()) else 1)


if __name__ == "__main__":
    main()
