"""The cost of the router: `make bench-router`.

Placements: a router and 64 workers, each behind a real gRPC server, with known costs and 10,000 cached blocks; the time
inside the two calls that place requests with objectives, half of them with a cached prefix. Tokens: a cluster of
simulated workers, the router on a core of its own, one token event per sequence and step, none merged; the router's
user and system time over the tokens that reached the client. Requests: a number of them over few connections, all of
which must end.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import uvloop

from baton.client import Client
from baton.client.types import Finished
from baton.cost import StepCost
from baton.messages import CacheUpdate, LoadReport
from baton.rpc import collector
from baton.telemetry import configure_logs
from benchmarks.report import Row, publish, spread
from benchmarks.serving.streaming import Flow, alone, cpu_s, pid_of, simulated, steady
from kvtransfer.blocks.prefix import block_digests
from router.app import Router
from router.workers.worker import Worker
from tests.router.crowd import crowd
from tests.router.tiny_model import EOS

PLACE_US, TOKEN_US = 200.0, 40.0
WORKERS, PLACED = 32, 400  # workers of each role
FLOWS = ((64, 20.0), (1000, 250.0))  # streams, milliseconds of a step: about as many tokens a second
WINDOW_S, ROUNDS = 8.0, 3
CONCURRENT = 128
PROMPT, CACHED_BLOCKS = 64, 10_000
COST = StepCost(chunk=0.002, per_token=7e-4, per_pair=1e-8, step=0.005, per_sequence=8e-4, per_resident=1e-7)
SLO = {"ttft_ms": 2000.0, "tpot_ms": 100.0}


class Timed:
    """Wraps a method of the router; `took` has the microseconds of each call."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call
        self.took: list[float] = []

    def __call__(self, *given: Any) -> Any:
        started = time.perf_counter()
        try:
            return self._call(*given)
        finally:
            self.took.append((time.perf_counter() - started) * 1e6)


async def placements() -> list[Row]:
    """Requests through a router in this process, with its two placing calls timed."""
    async with crowd(WORKERS, WORKERS, lambda spec: [10, 11, EOS]) as cluster:
        placer = cluster.router.requests.placer
        place, bind = Timed(placer.place), Timed(placer.choose_decode)
        placer.place = place  # type: ignore[method-assign, assignment]
        placer.choose_decode = bind  # type: ignore[method-assign, assignment]
        chance = random.Random(1)
        known = _fill(cluster.router, chance)
        collector.settle()  # as the router's own process does
        for _ in range(PLACED // 8):
            starts = [_prompt(chance) for _ in range(4)] + chance.sample(known, 4)
            asked = [start + _prompt(chance) + _prompt(chance) for start in starts]
            await asyncio.gather(*(cluster.generate(token_ids={"ids": ids}, slo=SLO) for ids in asked))
    both = sum(statistics.median(timed.took) for timed in (place, bind))
    parts = {
        "look its prefix up, and place the prompt": place,
        "look its prefix up, and pick the decode worker": bind,
    }
    return [
        *(
            Row(f"{name}, 64 workers", "us", statistics.median(timed.took), "", None, False, spread=spread(timed.took))
            for name, timed in parts.items()
        ),
        Row(f"both: a placement, 64 workers, {CACHED_BLOCKS} blocks indexed", "us", both, "target", PLACE_US, False,
            "at most 200 us", both <= PLACE_US),
    ]  # fmt: skip


def _prompt(chance: random.Random) -> list[int]:
    return [chance.randrange(3, 300) for _ in range(PROMPT)]


def _fill(router: Router, chance: random.Random) -> list[list[int]]:
    """All workers have told what a step costs them, and one each of these prompts is in their caches."""
    workers, prefixes = router.registry.workers(), router.requests.placer.prefixes
    layout = workers[0].card.kv_layout
    prompts = [_prompt(chance) for _ in range(CACHED_BLOCKS * layout.block_tokens // PROMPT)]
    held: dict[Worker, list[bytes]] = {worker: [] for worker in workers}
    for index, prompt in enumerate(prompts):
        worker = workers[index % len(workers)]
        held[worker] += block_digests(prompt, layout.block_tokens, "", worker.card.fingerprint)
    for worker, digests in held.items():
        worker.reported(LoadReport(free_blocks=worker.registration.blocks, cost=COST))
        sync = prefixes.expects(worker)
        prefixes.on_update(worker, CacheUpdate(sync.sync, sync.sequence, digests, ()))
    assert len(prefixes) == CACHED_BLOCKS, "all blocks are indexed"
    return prompts


async def flows() -> list[Row]:
    """Interleaved rounds of few and many steady streams; the router has a core of its own."""
    found: dict[int, list[Flow]] = {streams: [] for streams, _ in FLOWS}
    for _ in range(ROUNDS):
        for streams, step_ms in FLOWS:
            async with simulated(step_ms, streams) as cluster:
                router = pid_of(cluster, "router")
                others = [child.pid for child in cluster.processes if child.pid != router]
                with alone(router, [*others, os.getpid()]):
                    found[streams].append(await steady(cluster, streams, step_ms, WINDOW_S))
    rows = []
    for streams, runs in found.items():
        assert not any(run.merged for run in runs), f"{streams} streams: tokens were merged; this measures nothing"
        costs = [run.cpu_us for run in runs]
        rate = statistics.median(run.tokens / run.seconds for run in runs)
        us = statistics.median(costs)
        rows.append(
            Row(f"router CPU a token, {streams} streams, {rate:.0f} tokens/s", "us", us, "target", TOKEN_US, False,
                "at most 40 us", us <= TOKEN_US, spread(costs))
        )  # fmt: skip
    few, many = (runs[0].sockets for runs in found.values())
    more = sum(many.values()) - sum(few.values())
    rows.append(
        Row(f"sockets that {FLOWS[1][0]} streams need beyond those of {FLOWS[0][0]}", "", more, "target", 0, False,
            "none", more <= 0)
    )  # fmt: skip
    return rows


async def all_end(count: int) -> list[Row]:
    """`count` short requests, CONCURRENT at a time, through two workers of each role."""
    ended, numbers = 0, iter(range(count))
    async with (
        simulated(1.0, 2 * CONCURRENT, prefill=2, decode=2) as cluster,
        Client(cluster.address) as client,
    ):
        router, started = pid_of(cluster, "router"), time.perf_counter()
        before = cpu_s(router)

        async def work() -> None:
            nonlocal ended
            for index in numbers:
                prompt = [(index * 31 + place * 7) % 40_000 for place in range(32)]
                async for event in client.generate(token_ids=prompt, max_tokens=8, ignore_eos=True, timeout=120):
                    ended += isinstance(event, Finished)

        await asyncio.gather(*(work() for _ in range(CONCURRENT)))
        seconds, spent = time.perf_counter() - started, cpu_s(router) - before
    return [
        Row(f"of {count} requests, ended well", "", ended, "sent", count, True, "all", ended == count),
        Row("requests a second", "1/s", count / seconds, "", None, True),
        Row("router CPU a request of 8 tokens", "us", spent / count * 1e6, "", None, False),
    ]


async def measure(requests: int) -> list[Row]:
    return [*await placements(), *await flows(), *await all_end(requests)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=10_000)
    given = parser.parse_args()
    configure_logs("bench", level="error")
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        rows = runner.run(measure(given.requests))
    sys.exit(0 if publish("router", rows) else 1)


if __name__ == "__main__":
    main()
