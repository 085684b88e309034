"""A pair over a bad network: delay, stalls and resets on both of its connections, and a cable between two hosts.

Each test moves 200 sequences. Whatever breaks is bound again under a new handoff number, as a router does; none is
lost, and none is wrong: checksums are on, and every decode step compares all KV that it reads with what it should be.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import random
import traceback
from collections.abc import Awaitable, Callable
from multiprocessing.connection import Connection

import pytest

from tests.faults.harness import Workers, workers
from tests.faults.namespaces import NotPermitted, cable, enter
from tests.faults.proxy import Proxy
from tests.roles.counting import LAYOUT
from tests.rpc.waiting import until

TRANSFERS, AT_ONCE, EVENT_EVERY = 200, 8, 20
ROOMY = {"blocks": 128, "max_sequences": 32}


async def move_all(w: Workers, event: Callable[[int], Awaitable[object]]) -> int:
    """All transfers, some at once; `event(number)` between them. The number of handoffs that it took."""
    dice, handoffs, done = random.Random(11), 0, 0
    lengths = [dice.randrange(1, 10 * LAYOUT.block_tokens) for _ in range(TRANSFERS)]
    slots = asyncio.Semaphore(AT_ONCE)

    async def one(length: int) -> None:
        nonlocal handoffs, done
        async with slots:
            needed = await w.serve(w.spec(length, 4), "p0", "d0")
            handoffs, done = handoffs + needed, done + 1

    async with asyncio.TaskGroup() as group:
        for length in lengths:
            group.create_task(one(length))
        for number in range(TRANSFERS // EVENT_EVERY):
            await until(lambda number=number: done >= number * EVENT_EVERY, "transfers")  # type: ignore[misc]
            await event(number)
    await w["p0"].idle()
    await w["d0"].idle()
    assert done == TRANSFERS
    return handoffs


async def test_no_sequence_is_lost_or_wrong_amid_delays_stalls_and_resets() -> None:
    async with workers("tcp") as w:
        w.add("p0", settings=ROOMY)
        w.add("d0", settings=ROOMY)
        await w.start(proxied=True, control_proxied=True)
        assert w.wire is not None
        assert w.control is not None
        wires: tuple[Proxy, Proxy] = (w.wire, w.control)
        for proxy in wires:
            proxy.delay_s = 0.005
        cuts, dice = 0, random.Random(7)

        async def event(number: int) -> None:
            nonlocal cuts
            proxy = wires[number % 2]
            if number % 4 < 2:
                cuts += await proxy.cut_within(dice.randrange(1, 4 * LAYOUT.block_bytes), 2.0)
            else:
                await proxy.stall(0.1)

        handoffs = await move_all(w, event)
        assert cuts >= 3
        assert handoffs > TRANSFERS, "nothing was under way when it was cut"
        print(f"{TRANSFERS} transfers in {handoffs} handoffs, {cuts} resets, {wires[0].carried} bytes of blocks")


def drive(pipe: Connection, names: tuple[str, str], addresses: tuple[str, str]) -> None:
    """The router of the test between namespaces, in the first of them; the process of the test stays outside."""

    async def event(number: int) -> None:
        if number % 5 == 1:
            pipe.send("pull")
            await until(pipe.poll, "the cable")
            pipe.recv()

    async def run() -> None:
        async with workers("tcp") as w:
            for name, host, namespace in zip(("p0", "d0"), addresses, names, strict=True):
                w.add(name, settings=ROOMY | {"host": host}, namespace=namespace)
            await w.start()
            pipe.send(await move_all(w, event))

    enter(names[0])
    try:
        asyncio.run(run())
    except BaseException:  # noqa: BLE001  # the test gets it, whatever it is
        pipe.send(traceback.format_exc())


async def test_no_sequence_is_lost_or_wrong_while_the_cable_is_pulled() -> None:
    """The cable is pulled for a moment, now and then."""
    try:
        with cable() as made:
            context = multiprocessing.get_context("forkserver")
            pipe, theirs = context.Pipe()
            child = context.Process(target=drive, args=(theirs, made.names, made.addresses))
            child.start()
            theirs.close()
            pulls = 0
            try:
                while True:
                    async with asyncio.timeout(60):
                        while not pipe.poll():
                            await asyncio.sleep(0.005)
                    said = pipe.recv()
                    if said != "pull":
                        break
                    made.pull()
                    await asyncio.sleep(0.3)
                    made.plug()
                    pulls += 1
                    pipe.send("plugged")
                assert isinstance(said, int), said
                assert said >= TRANSFERS
                assert pulls == TRANSFERS // EVENT_EVERY // 5
                print(f"{TRANSFERS} transfers in {said} handoffs, {pulls} interruptions")
                await until(lambda: not child.is_alive(), "the end of the router")
            finally:
                child.kill()
                child.join()
                child.close()
                pipe.close()
    except NotPermitted as why:
        pytest.skip(f"no network namespaces here: {why}")
