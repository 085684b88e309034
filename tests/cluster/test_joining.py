"""Processes that meet for the first time: other versions, and addresses that are another's."""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest

from baton.children import child_environment
from baton.client import Client
from baton.client.types import Finished
from baton.config import WorkerConfig
from baton.errors import BatonError, ConfigError, Unavailable
from baton.launch.child import Child
from baton.launch.cluster import PROGRAM
from baton.launch.worker import check_address
from tests.cluster.conftest import Running, running

SIMULATED = ("--engine", "simulated", "--cost-model", "instant", "--pool-tokens", "4096")
WAIT_S = 20.0
HURRIED = (sys.executable, "-m", "tests.launch.hurried")


@asynccontextmanager
async def process(*command: str, program: Sequence[str] = PROGRAM, ready: bool = True) -> AsyncIterator[Child]:
    """One process by hand; its command starts with its role. Raises as `Child.wait_ready` where it must be ready."""
    role = command[0]
    child = await Child.start(role, role, [*program, *command], child_environment(), lambda line: None)
    try:
        async with asyncio.timeout(WAIT_S):
            if ready:
                await child.wait_ready()
        yield child
    finally:
        child.kill()
        await child.wait_exited()


def worker(role: str, router: Child, *flags: str, model: str = "bytes") -> tuple[str, ...]:
    return (role, "--router", router.address, "--listen", "127.0.0.1:0", "--model", model, *SIMULATED, *flags)


def speaking(least: int, most: int) -> tuple[str, ...]:
    return (sys.executable, "-m", "tests.launch.speaking", str(least), str(most))


async def test_a_pool_is_upgraded_one_process_at_a_time() -> None:
    """Old and new workers join a router that speaks both versions, and hand over to each other; one that has no version
    in common with the router is refused, and so is a pair without one."""
    async with (
        process("router", "--listen", "127.0.0.1:0", "--path", "disaggregated", program=speaking(1, 2)) as router,
        process(*worker("prefill", router, "--name", "old"), program=speaking(1, 1)),
        process(*worker("decode", router, "--name", "new"), program=speaking(1, 3)) as new,
        Client(router.address) as client,
    ):
        completion = await client.complete(token_ids=[1, 2, 3] * 20, max_tokens=5, timeout=WAIT_S)
        timeline = completion.finished.timeline
        assert (timeline.prefill_worker, timeline.decode_worker) == ("old", "new")
        with pytest.raises(Unavailable, match="protocol version differs: here 1 to 2, there 3"):
            async with process(*worker("decode", router), program=speaking(3, 3)):
                raise AssertionError("it must not join")
        new.terminate()
        await new.wait_exited()
        async with process(*worker("decode", router, "--name", "newest"), program=speaking(2, 2)):
            with pytest.raises(BatonError, match="version differs"):
                await client.complete(token_ids=[4, 5, 6] * 20, max_tokens=5, timeout=3.0)


IMPOSTORS = [
    ("decode", "decode-0", "bytes"),
    ("prefill", "decode-0", "bytes"),
    ("decode", "prefill-0", "bytes"),
    ("decode", "router", "bytes"),
    ("decode", "decode-0", "smollm2-135m"),  # of another model: the router asks it for its tokeniser first
]


async def test_workers_with_anothers_address_are_told_and_the_others_feel_nothing() -> None:
    simulated: dict[str, Any] = {"engine": "simulated", "model": "bytes", "cost_model": "instant"}
    async with running(pool_tokens=4096, program=HURRIED, **simulated) as healthy:  # with leases that end soon
        router, *_ = healthy.cluster.processes
        addresses = {child.name: child.address for child in healthy.cluster.processes}

        async def join(number: int, role: str, whose: str, model: str) -> None:
            flags = ("--advertise", addresses[whose], "--name", f"impostor-{number}")
            said = rf"worker\.address: {re.escape(addresses[whose])} is not impostor-{number}'s own"
            with pytest.raises(ConfigError, match=said):  # its exit status is 2
                async with process(*worker(role, router, *flags, model=model)):
                    raise AssertionError("it must not become ready")

        stream = asyncio.create_task(slow_stream(healthy))
        await asyncio.gather(*(join(number, *one) for number, one in enumerate(IMPOSTORS)))
        assert await stream == 500
        assert {one.name for one in await healthy.client.workers()} == {"prefill-0", "decode-0"}
        assert not any("routers_lost" in status.counters for status in await healthy.statuses())
        assert (await healthy.client.status()).counters["workers_lost"] == len(IMPOSTORS)


async def slow_stream(cluster: Running) -> int:
    """Tokens of a stream that lasts some seconds."""
    count = 0
    async for event in cluster.client.generate(token_ids=[1, 2, 3], max_tokens=500, ignore_eos=True, timeout=WAIT_S):
        if isinstance(event, Finished):
            return event.usage.output_tokens
        count += 1
        await asyncio.sleep(0.005)
    raise AssertionError("the stream ended without a word")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--advertise", "127.0.0.1:0"), "advertise: 127.0.0.1:0 has port 0"),
        (("--advertise", "0.0.0.0:9701"), "advertise: 0.0.0.0 is every address"),
        (("--advertise", "[::]:9701"), "advertise: :: is every address"),
        (("--advertise", "no-such-host.invalid:9701"), "advertise: no-such-host.invalid does not resolve"),
        (("--tcp-advertise", "0.0.0.0:9702"), "tcp_advertise: 0.0.0.0 is every address"),
        (("--tcp-advertise", "127.0.0.1:0"), "tcp_advertise: 127.0.0.1:0 has port 0"),
        (("--router", "127.0.0.1:0"), "router: 127.0.0.1:0 has port 0"),
        (("--listen", "0.0.0.0:0"), "advertise: needed with listen on 0.0.0.0"),
    ],
)
def test_an_address_that_nobody_can_dial_is_refused_before_anything_is_loaded(
    flags: tuple[str, ...], said: str
) -> None:
    given = {flags[0].removeprefix("--").replace("-", "_"): flags[1]}
    with pytest.raises(ConfigError, match=re.escape(said)):
        check_address(WorkerConfig(roles=frozenset({"decode"}), **given))  # type: ignore[arg-type]
