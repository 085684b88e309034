"""Picks the transport to a decode worker by connecting: the best of its endpoints that is proved to work."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from concurrent.futures import Executor
from typing import NamedTuple

from baton import errors
from baton.spec import ProcessRef
from kvtransfer.transports.base import Channel, Writer

WHY_CHARS = 200
"""The most that is kept of why a transport did not work."""


class Connected(NamedTuple):
    """`note` says why each better transport could not be used, as in `shm: d0 refused the connection`."""

    transport: str
    channel: Channel
    note: str


async def connect_best(
    endpoints: Mapping[str, str], writers: Mapping[str, Writer], peer: ProcessRef, executor: Executor, seconds: float
) -> Connected:
    """`endpoints` by transport, best first. Each try gets an even share of the time that is left, so that one without
    an answer leaves some for the next.

    Raises `Mismatch` at once: another transport must not get around a setting in which both ends differ. Raises
    `PeerClosed`, which names every try, where none worked.
    """
    loop, deadline = asyncio.get_running_loop(), time.monotonic() + seconds
    failures: list[str] = []
    for tried, (kind, endpoint) in enumerate(endpoints.items()):
        now = time.monotonic()
        until = now + (deadline - now) / (len(endpoints) - tried)
        try:
            channel = await loop.run_in_executor(executor, writers[kind].connect, endpoint, peer, until)
        except errors.Mismatch as error:
            named = "; ".join([str(error), *failures])
            raise errors.Mismatch(error.field, error.ours, error.theirs, named) from error
        except errors.BatonError as error:
            failures.append(_short(f"{kind}: {error}"))
        else:
            return Connected(kind, channel, "; ".join(failures))
    raise errors.PeerClosed(f"no transport works: {'; '.join(failures)}")


def _short(text: str) -> str:
    """On one line, and bounded."""
    line = " ".join(text.split())
    return line if len(line) <= WHY_CHARS else f"{line[: WHY_CHARS - 3]}..."
