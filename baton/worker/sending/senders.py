"""A worker's senders, one for each living incarnation of a decode worker that prompts were bound to."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from baton.spec import ProcessRef
from baton.telemetry import Counts
from baton.v1 import transfer_pb2 as wire
from baton.worker.sending.outbound import OutboundEvents
from baton.worker.sending.sender import Sender
from kvtransfer.transports.base import Writer

WRITE_THREADS = 32
"""Made when needed. A stalled peer keeps one busy until its deadline; the other peers must not wait for it."""


class Senders:
    """Makes senders and ends them; owns the threads that write."""

    def __init__(
        self,
        handshake: wire.HandshakeRequest,
        transports: dict[str, Writer],
        events: OutboundEvents,
        deadline_s: float,
        counts: Counts,
    ) -> None:
        self._handshake, self._transports, self._events = handshake, transports, events
        self._deadline_s, self._counts = deadline_s, counts
        self._senders: dict[str, Sender] = {}
        self._executor = ThreadPoolExecutor(WRITE_THREADS, thread_name_prefix="kv-write")

    def __len__(self) -> int:
        return len(self._senders)

    def __iter__(self) -> Iterator[Sender]:
        return iter(list(self._senders.values()))

    @property
    def handoffs(self) -> int:
        return sum(sender.handoffs for sender in self._senders.values())

    def by_transport(self) -> Counter[str]:
        return Counter(sender.transport for sender in self.connected())

    def notes(self) -> dict[str, str]:
        """By transport in use: why a better one could not be used, of one of the peers for which that is so."""
        return {sender.transport: sender.note for sender in self.connected() if sender.note}

    def connected(self) -> list[Sender]:
        return [sender for sender in self if sender.transport]

    def to(self, peer: ProcessRef) -> Sender:
        """The sender to exactly this incarnation; a new one where the former has closed."""
        sender = self._senders.get(peer.incarnation)
        if sender is None or sender.closed:
            self._senders = {key: other for key, other in self._senders.items() if not other.closed}
            sender = self._senders[peer.incarnation] = Sender(
                peer, self._handshake, self._transports, self._events, self._executor, self._deadline_s, self._counts
            )
        return sender

    async def stop(self) -> None:
        """Waits for the writes under way."""
        await asyncio.gather(*(sender.stop() for sender in self._senders.values()))
        await asyncio.to_thread(self._executor.shutdown)
