"""Requests that are large in each way that a request can be, while others' tokens and health checks are timed.

`long_texts` compares turns with and without them.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

import grpc

from baton.children import PYTHON, child_environment, die_with_parent
from baton.rpc import net
from baton.v1 import generation_pb2 as gen
from tests.cluster.conftest import Running, running
from tests.hostile.others import Others, p99_ms
from tests.hostile.rows import Row, at_most, equal

BOUND_MS = 50.0
"""How much later others may be answered at the 99th percentile."""
ATTACK_S, PAUSE_S = 20.0, 0.1
"""An attack's deadline, and the pause before it comes again."""
TURNS, TURN_S = 2, 6.0
MODELS = ("bytes", "smollm2-135m")
"""One whose context lets megabytes through to the process, and one that refuses most by their bytes."""
MEGABYTE = 1024 * 1024


class Attack(NamedTuple):
    """A call with these bytes; `method` of the Generation service."""

    name: str
    method: str
    data: bytes


def _chat(count: int) -> gen.Chat:
    """`count` empty messages of a user, which are 8 bytes each."""
    return gen.Chat(messages=[gen.ChatMessage(role="user")] * count)


def _attack(name: str, **given: Any) -> list[Attack]:
    generate, tokenize = gen.GenerateRequest(**given), gen.TokenizeRequest(**given)
    return [
        Attack(f"Generate, {name}", "Generate", generate.SerializeToString()),
        Attack(f"Tokenize, {name}", "Tokenize", tokenize.SerializeToString()),
    ]


def _tiny(size: int) -> list[Attack]:
    """A chat of so many bytes, two for each message; written out, since protobuf would need gigabytes for it."""
    attacks = []
    for method, kind in (("Generate", gen.GenerateRequest), ("Tokenize", gen.TokenizeRequest)):
        key, length = bytes([kind.DESCRIPTOR.fields_by_name["chat"].number << 3 | 2]), b""
        left = size
        while left > 0x7F:
            length, left = length + bytes([left & 0x7F | 0x80]), left >> 7
        data = key + length + bytes([left]) + b"\x0a\x00" * (size // 2)
        attacks.append(Attack(f"{method}, {size} bytes of tiny messages", method, data))
    return attacks


def too_long() -> list[Attack]:
    """Beyond the limits of a small context, some beyond those of any."""
    attacks = _attack("280,000 empty messages", chat=_chat(280_000))
    attacks += _attack("a prompt of 1 MB", prompt="0123456789" * (MEGABYTE // 10))
    attacks += _attack("a prompt of 4 MB", prompt="7 " * (2 * MEGABYTE - 100))
    return attacks + _tiny(30 * MEGABYTE) + _tiny(4 * MEGABYTE - 100)


def within_limits() -> list[Attack]:
    """What even a context of 8,192 tokens lets through to the tokeniser."""
    attacks = _attack("8,000 empty messages", chat=_chat(8_000))
    return attacks + _attack("a prompt of 200 kB", prompt="0123456789" * 20_000)


async def strike(channel: grpc.aio.Channel, attack: Attack) -> str:
    """Sends it; the status that it gets, by name."""
    send: Any = channel.unary_stream if attack.method == "Generate" else channel.unary_unary
    call = send(f"/baton.v1.Generation/{attack.method}")(attack.data, timeout=ATTACK_S)
    try:
        if attack.method == "Tokenize":
            await call
        else:
            async for _ in call:
                pass
    except grpc.aio.AioRpcError as error:
        return str(error.code().name)
    return "OK"


async def long_texts() -> list[Row]:
    """In clusters of its own; the attackers are another process."""
    return [row for model in MODELS for row in await _measure(model)]


async def _measure(model: str) -> list[Row]:
    plain, attacked = [], []
    async with running(engine="simulated", model=model, prefill=1, decode=1) as cluster:
        for _ in range(TURNS):
            plain.append(await _turn(cluster, attack=False))
            attacked.append(await _turn(cluster, attack=True))
        counters = (await cluster.client.status()).counters
    rows, where = [], f"under long texts ({model})"
    for name, pick in (("tokens", "gaps"), ("health checks", "waits")):
        without, under = ([x for turn in turns for x in getattr(turn, pick)] for turns in (plain, attacked))
        plain_ms, under_ms = p99_ms(without), p99_ms(under)
        rows.append(
            at_most(f"p99 of others' {name} {where}, over {plain_ms:.0f} ms", BOUND_MS, under_ms - plain_ms, "ms")
        )
    return [*rows, equal(f"workers lost {where}", 0, counters.get("workers_lost", 0))]


async def _turn(cluster: Running, *, attack: bool) -> Others:
    others = Others(cluster)
    async with others.busy(), _attackers(cluster.cluster.address) if attack else contextlib.nullcontext():
        others.gaps.clear()
        others.waits.clear()
        await asyncio.sleep(TURN_S)
    return others


@contextlib.asynccontextmanager
async def _attackers(address: str) -> AsyncIterator[None]:
    command = (*PYTHON, "tests.hostile.long_texts", address, str(os.getpid()))
    process = await asyncio.create_subprocess_exec(*command, env=child_environment(), stdout=PIPE)
    try:
        assert process.stdout is not None
        assert await process.stdout.readline(), "they have started"
        yield
        assert process.returncode is None, "they attack to the end"
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def _attack_for_ever(address: str) -> None:
    """Each attack again and again, beside the others."""

    async def repeat(attack: Attack) -> None:
        async with net.open_channel(address) as channel:
            while True:
                await strike(channel, attack)
                await asyncio.sleep(PAUSE_S)

    attacks = [*too_long(), *within_limits()]
    print("ready", flush=True)
    await asyncio.gather(*map(repeat, attacks))


if __name__ == "__main__":  # the attackers
    address, parent = sys.argv[1:]
    die_with_parent(int(parent))
    os.nice(19)  # as if on a machine of its own: it should not take the cores of those whom it attacks
    asyncio.run(_attack_for_ever(address))
