"""The common part of all channels: one write at a time, which an error or a close ends."""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence

from baton.errors import BatonError, ChecksumMismatch, PeerClosed, WriteRefused
from baton.spec import ProcessRef
from kvtransfer.handoffs.messages import BlockMove, Ticket
from kvtransfer.transports.base import BlockMemory, WriteReceipt


class BlockChannel(ABC):
    """Implements `Channel`; a subclass moves the bytes. Its constructor connects, raises as `Writer.connect` says, and
    closes the channel before it raises."""

    def __init__(self, source: BlockMemory, peer: ProcessRef) -> None:
        self._peer = peer
        self._source_blocks = source.blocks
        self._block_bytes = source.layout.block_bytes
        self._closing = False
        self._broken = False
        self._busy = threading.Lock()  # held by a write, and while the channel is freed

    def write(self, ticket: Ticket, moves: Sequence[BlockMove], deadline: float) -> WriteReceipt:
        started = time.monotonic()
        _check(ticket, moves, self._source_blocks)
        with self._busy:
            if self._broken or self._closing:
                raise PeerClosed(f"the connection to {self._peer.name} is closed")
            try:
                self._move(ticket, moves, deadline)
            except (WriteRefused, ChecksumMismatch):
                raise
            except BatonError:
                self._broken = True  # an answer, or half a batch, is still on the way
                self._give_up()
                raise
        return WriteReceipt(len(moves) * self._block_bytes, time.monotonic() - started)

    def close(self) -> None:
        self._closing = True
        self._interrupt()
        with self._busy:
            self._free()

    @abstractmethod
    def _move(self, ticket: Ticket, moves: Sequence[BlockMove], deadline: float) -> None:
        """Raises as `Channel.write` says."""

    def _give_up(self) -> None:  # noqa: B027  # most kinds have nothing to do
        """After an error: returns when nothing more is read from the source."""

    @abstractmethod
    def _interrupt(self) -> None:
        """End the waits of a write under way; from any thread, at any time."""

    @abstractmethod
    def _free(self) -> None:
        """Free the channel's resources, with no write under way. Idempotent."""


def _check(ticket: Ticket, moves: Sequence[BlockMove], source_blocks: int) -> None:
    """Before anything is sent. Raises `WriteRefused` for a move that its ticket does not allow."""
    for move in moves:
        assert 0 <= move.source < source_blocks, f"source block {move.source} of {source_blocks}"
        if ticket.destination(move.index) != move.destination:
            raise WriteRefused(f"{ticket.key}: block {move.index} may not go to {move.destination}")
