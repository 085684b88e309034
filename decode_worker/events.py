"""From the transports' threads to the decode role's event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from baton.spec import HandoffKey
from decode_worker.service import DecodeRole


class LoopEvents:
    """Implements `kvtransfer.transports.base.ReceiverEvents` for a role that is made after the transports."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._role: DecodeRole | None = None

    def deliver_to(self, role: DecodeRole) -> None:
        """Events before this have nobody to hear them: nothing is admitted yet."""
        self._role = role

    def landed(self, key: HandoffKey, generation: int, indices: Sequence[int]) -> None:
        """See `ReceiverEvents`."""
        blocks = tuple(indices)
        self._post(lambda role: role.landed(key, generation, blocks))

    def revoked(self, key: HandoffKey) -> None:
        """See `ReceiverEvents`."""
        self._post(lambda role: role.revoked(key))

    def writer_gone(self, incarnation: str) -> None:
        """See `ReceiverEvents`."""
        self._post(lambda role: role.writer_gone(incarnation))

    def refused_write(self, key: HandoffKey, why: str) -> None:
        """See `ReceiverEvents`."""
        self._post(lambda role: role.refused_write(key, why))

    def _post(self, action: Callable[[DecodeRole], None]) -> None:
        if self._role is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(action, self._role)
