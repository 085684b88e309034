"""Almost valid requests, thousands of them, against a router beside healthy streams.

`python -m tests.hostile.fuzz ADDRESS FIRST COUNT SECONDS` sends those of the seeds from FIRST on, at most COUNT and no
longer than that, and prints what came of them as JSON. It is a process of its own, so that the healthy streams' clock
does not wait for it.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
import time
from asyncio.subprocess import PIPE
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import grpc

from baton.rpc import net
from tests.hostile.mutations import Call, call_of

AT_ONCE = 8
CALL_S = 60.0
EVENTS = 40
"""A mutation may ask for a long answer: the client leaves after so many events."""
FAULTS = {"INTERNAL", "UNKNOWN", "UNAVAILABLE", "DATA_LOSS", "DEADLINE_EXCEEDED"}
"""No answer to a request of whatever bytes: the first four are faults of ours, and the last one is no answer."""


@dataclass
class Found:
    """`statuses` by name; `faults` are the seeds that got one of `FAULTS`, with its text."""

    sent: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    faults: dict[int, str] = field(default_factory=dict)


async def send(channel: grpc.aio.Channel, call: Call) -> tuple[str, str]:
    """The status's name, and its text."""
    kind: Any = channel.unary_stream if call.streams else channel.unary_unary
    sent = kind(f"/baton.v1.{call.service}/{call.method}")(call.data, timeout=CALL_S)
    try:
        if not call.streams:
            await sent
            return "OK", ""
        events = 0
        async for _ in sent:
            events += 1
            if events == EVENTS:
                sent.cancel()
                return "left", ""
    except grpc.aio.AioRpcError as error:
        return error.code().name, error.details() or ""
    return "OK", ""


async def attack(address: str, first: int, count: int, seconds: float) -> Found:
    """In the order of the seeds, several at once."""
    found, until, seeds = Found(), time.monotonic() + seconds, itertools.count(first)
    async with net.open_client_channel(address) as channel:

        async def work() -> None:
            while found.sent < count and time.monotonic() < until:
                found.sent += 1
                seed = next(seeds)
                call = call_of(seed)
                status, text = await send(channel, call)
                found.statuses[status] += 1
                if status in FAULTS:
                    found.faults[seed] = f"{status}: {text[:300]}"

        await asyncio.gather(*(work() for _ in range(AT_ONCE)))
    return found


async def attack_apart(address: str, first: int, count: int, seconds: float) -> Found:
    """In a process of its own."""
    command = (sys.executable, "-m", "tests.hostile.fuzz", address, str(first), str(count), str(seconds))
    process = await asyncio.create_subprocess_exec(*command, stdout=PIPE)
    try:
        out, _ = await asyncio.wait_for(process.communicate(), seconds + 3 * CALL_S)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    given = json.loads(out)
    return Found(given["sent"], Counter(given["statuses"]), {int(seed): text for seed, text in given["faults"].items()})


if __name__ == "__main__":
    where, *numbers = sys.argv[1:]
    found_there = asyncio.run(attack(where, int(numbers[0]), int(numbers[1]), float(numbers[2])))
    print(json.dumps(vars(found_there)))
