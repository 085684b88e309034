"""The time that serving adds to the engine's own: `make bench-overhead`.

The engine alone and an idle 1+1 take turns with fresh prompts of 1,000 tokens, the engine and the prefill worker on the
same core. Also: the time from `baton up` to the first streamed token, and the router's memory.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import statistics
import sys
import time

from baton.client import Client
from baton.client.types import Finished, Tokens
from baton.launch.cluster import ClusterConfig, LocalCluster
from benchmarks.report import Row, publish, spread

PROMPT = 1000
ROUNDS = 15
VOCABULARY = 49_152
TARGET_MS, START_TARGET_S, ROUTER_TARGET_MB = 10.0, 12.0, 200.0

ENGINE = """
import json, sys, time
import torch
torch.set_num_threads(1)
from baton.engine.api import Sequence, Work
from baton.engine.files.card import describe
from baton.engine.files.models import resolve
from baton.engine.load import load_engine
from baton.spec import Sampling
engine = load_engine(describe(resolve("smollm2-135m")), blocks=80)
engine.warm_up()
print("ready", flush=True)
for line in sys.stdin:
    tokens = json.loads(line)
    started = time.perf_counter()
    sequence = Sequence(bytes(16), tokens, len(tokens), list(range(80)), 0, Sampling(temperature=0.0))
    while sequence.remaining:
        engine.step([Work(sequence, min(512, sequence.remaining))])
    print(time.perf_counter() - started, flush=True)
"""


class EngineAlone:
    """A process with the engine alone, on the prefill worker's core."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._process, self._stdin, self._stdout = process, process.stdin, process.stdout

    @classmethod
    async def start(cls) -> EngineAlone:
        core = min(os.sched_getaffinity(0))
        pipe = asyncio.subprocess.PIPE
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        program = ("taskset", "-c", str(core), sys.executable, "-c", ENGINE)
        process = await asyncio.create_subprocess_exec(*program, stdin=pipe, stdout=pipe, env=environment)
        alone = cls(process)
        assert await alone._line() == "ready"
        return alone

    async def prefill_ms(self, tokens: list[int]) -> float:
        """From the first chunk to the first token."""
        self._stdin.write(json.dumps(tokens).encode() + b"\n")
        return float(await self._line()) * 1e3

    async def stop(self) -> None:
        self._stdin.close()
        await asyncio.wait_for(self._process.wait(), 30)

    async def _line(self) -> str:
        return (await asyncio.wait_for(self._stdout.readline(), 120)).decode().strip()


async def served_ms(client: Client, tokens: list[int]) -> tuple[float, float]:
    """(client's clock: request sent to first token received; the timeline's own prefill time)."""
    started = time.perf_counter()
    first, prefill = 0.0, 0.0
    async for event in client.generate(token_ids=tokens, temperature=0.0, max_tokens=4, ignore_eos=True, timeout=120):
        if isinstance(event, Tokens) and not first:
            first = (time.perf_counter() - started) * 1e3
        if isinstance(event, Finished):
            prefill = event.timeline.prefill_ms
    return first, prefill


async def start_to_first_token_s() -> float:
    """From the start of a cluster to its first token, with environment and model present."""
    started = time.perf_counter()
    async with LocalCluster(ClusterConfig(listen="127.0.0.1:0")) as cluster, Client(cluster.address) as client:
        async for event in client.generate(prompt="Hello", max_tokens=1, timeout=60):
            if isinstance(event, Tokens):
                return time.perf_counter() - started
    raise AssertionError("no token came")


async def measure() -> list[Row]:
    generator = random.Random(1)
    starts = [await start_to_first_token_s() for _ in range(3)]
    ttft: list[float] = []
    inside: list[float] = []
    alone_ms: list[float] = []
    config = ClusterConfig(listen="127.0.0.1:0", pin=True)
    async with LocalCluster(config) as cluster, Client(cluster.address) as client:
        alone = await EngineAlone.start()
        for round_ in range(ROUNDS + 2):
            fresh = [[generator.randrange(100, VOCABULARY) for _ in range(PROMPT)] for _ in range(2)]
            engine_ms = await alone.prefill_ms(fresh[0])
            first, prefill = await served_ms(client, fresh[1])
            if round_ >= 2:  # the first rounds warm up
                alone_ms.append(engine_ms)
                ttft.append(first)
                inside.append(prefill)
        await alone.stop()
        router_mb = (await client.status()).resident_bytes / 2**20
    extra = statistics.median(ttft) - statistics.median(alone_ms)
    around = [served - computed for served, computed in zip(ttft, inside, strict=True)]
    return [
        Row("TTFT, 1,000 tokens", "ms", statistics.median(ttft), "engine alone", statistics.median(alone_ms), False,
            spread=spread(ttft)),
        Row("difference of the medians", "ms", extra, "target", TARGET_MS, False, "at most 10 ms", extra <= TARGET_MS),
        Row("TTFT less the worker's own prefill time", "ms", statistics.median(around), "target", TARGET_MS, False,
            "at most 10 ms", statistics.median(around) <= TARGET_MS, spread(around)),
        Row("baton up to first token", "s", statistics.median(starts), "target", START_TARGET_S, False,
            "at most 12 s", max(starts) <= START_TARGET_S, spread(starts)),
        Row("router resident memory", "MB", router_mb, "target", ROUTER_TARGET_MB, False, "at most 200 MB",
            router_mb <= ROUTER_TARGET_MB),
    ]  # fmt: skip


def main() -> None:
    sys.exit(0 if publish("overhead", asyncio.run(measure())) else 1)


if __name__ == "__main__":
    main()
