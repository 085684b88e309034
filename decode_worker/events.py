"""Passes events from the transports' threads to the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from baton.spec import HandoffKey
from kvtransfer.transports.base import ReceiverEvents


class LoopEvents:
    """A `ReceiverEvents` that calls `target` on the event loop on which it was made."""

    def __init__(self, target: ReceiverEvents) -> None:
        self._loop, self._target = asyncio.get_running_loop(), target

    def landed(self, key: HandoffKey, generation: int, indices: Sequence[int]) -> None:
        self._post(self._target.landed, key, generation, tuple(indices))

    def revoked(self, key: HandoffKey) -> None:
        self._post(self._target.revoked, key)

    def writer_gone(self, incarnation: str) -> None:
        self._post(self._target.writer_gone, incarnation)

    def refused_write(self, key: HandoffKey, why: str) -> None:
        self._post(self._target.refused_write, key, why)

    def _post(self, action: Callable[..., None], *given: Any) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(action, *given)
