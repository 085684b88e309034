"""Several channels to one receiver as one, where a single connection is not as fast as the network."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait

from baton.errors import BatonError, ChecksumMismatch, WriteRefused
from kvtransfer.handoffs.messages import BlockMove, Ticket
from kvtransfer.transports.base import Channel, WriteReceipt

REFUSALS = (WriteRefused, ChecksumMismatch)


class ParallelChannel:
    """Implements `Channel`: each write is shared out, and over when every share is. It owns the channels.

    Where one of them breaks all are closed, so that the write ends at once with no share still under way.
    """

    def __init__(self, channels: Sequence[Channel]) -> None:
        assert len(channels) > 1, "one channel needs no company"
        self._channels = list(channels)
        self._threads = ThreadPoolExecutor(len(channels), thread_name_prefix="kv-share")

    def write(self, ticket: Ticket, moves: Sequence[BlockMove], deadline: float) -> WriteReceipt:
        started = time.monotonic()
        size = -(-len(moves) // len(self._channels)) or 1
        shares = [moves[first : first + size] for first in range(0, len(moves), size)] or [moves]
        futures = [
            self._threads.submit(self._share, channel, ticket, share, deadline)
            for channel, share in zip(self._channels, shares, strict=False)
        ]
        wait(futures)  # each ends by the deadline
        errors = [error for future in futures if (error := future.exception()) is not None]
        for error in sorted(errors, key=lambda error: isinstance(error, REFUSALS)):
            raise error  # the one that broke the channel, else a refusal
        return WriteReceipt(sum(future.result() for future in futures), time.monotonic() - started)

    def close(self) -> None:
        for channel in self._channels:
            channel.close()
        self._threads.shutdown()

    def _share(self, channel: Channel, ticket: Ticket, moves: Sequence[BlockMove], deadline: float) -> int:
        try:
            return channel.write(ticket, moves, deadline).bytes
        except REFUSALS:
            raise
        except BatonError:
            for other in self._channels:
                other.close()
            raise
