"""Roles that stop themselves at a step of the handoff, say so to the test and wait for its word."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from multiprocessing.connection import Connection
from typing import Any

from baton.spec import HandoffKey, ProcessRef
from baton.worker.sending.pair import PairStream
from kvtransfer.handoffs.messages import Aborted, BlockMove, Ticket
from kvtransfer.transports.base import Channel, Receiver, ReceiverEvents, Writer, WriteReceipt
from kvtransfer.transports.memory import MemoryNetwork
from kvtransfer.transports.shm.writer import ShmChannel, ShmWriter
from tests.roles.counting import GENEROUS
from tests.roles.node import DecodeNode, PrefillNode, Settings


class Step(Enum):
    """Where a worker stops, once. All but the last are on the prefill worker."""

    AFTER_GRANT = "after grant"  # before the first byte
    MID_BLOCK = "mid-block"  # half of the first block is copied; with tcp it is the test's proxy that stops there
    BETWEEN_CHUNKS = "between chunks"  # the first chunk's blocks are in place, the second chunk is not computed
    BEFORE_COMMIT = "before commit"  # all blocks are in place
    AFTER_COMMIT = "after commit"  # resident, and the prefill worker has not heard of it
    LATE_ANSWER = "late answer"  # the blocks have landed, and the receiver's transport does not say so


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a worker process is, and where it goes wrong."""

    role: str
    name: str
    settings: Settings
    stop_at: Step | None = None
    prompt_blocks: int = 0
    forge: dict[str, Any] | None = None
    """Fields of every ticket that its writes claim instead of the true ones."""
    namespace: str | None = None
    """Of the network."""
    own_pids: bool = False
    """In a PID namespace of its own."""


class Stop:
    """The point where the process waits for the test's word, from whichever thread comes there; once."""

    def __init__(self, at: Step | None, pipe: Connection) -> None:
        self.at = at
        self._pipe = pipe

    def here(self, step: Step) -> None:
        """Stops if this is the step."""
        if self.at is step:
            self.at = None
            self._pipe.send(step.value)
            assert self._pipe.poll(3 * GENEROUS), "the test gave no word"
            self._pipe.recv()


class WatchedReceiver:
    """`endpoint_` takes the place of the receiver's own."""

    def __init__(self, inner: Receiver) -> None:
        self.inner = inner
        self.endpoint_ = ""
        self.kind, self.revoke_proves = inner.kind, inner.revoke_proves
        self.admit, self.revoke, self.close = inner.admit, inner.revoke, inner.close

    def endpoint(self) -> str:
        return self.endpoint_ or self.inner.endpoint()


class WatchedWriter:
    """A writer between whose calls the process can be stopped."""

    def __init__(self, inner: Writer, stop: Stop, forge: dict[str, Any] | None) -> None:
        self.inner, self.stop, self.forge = inner, stop, forge
        self.kind, self.close = inner.kind, inner.close
        self.placed = 0
        self.changed = threading.Condition()

    def connect(self, endpoint: str, peer: ProcessRef, deadline: float) -> Channel:
        if isinstance(self.inner, ShmWriter) and self.stop.at is Step.MID_BLOCK:
            return WatchedChannel(HalfWay(self.stop, self.inner, endpoint, peer, deadline), self)
        return WatchedChannel(self.inner.connect(endpoint, peer, deadline), self)

    def wait_placed(self, blocks: int) -> None:
        """Until so many blocks of all writes are in place."""
        with self.changed:
            assert self.changed.wait_for(lambda: self.placed >= blocks, GENEROUS), "the writes did not end"


class WatchedChannel:
    """See `WatchedWriter`."""

    def __init__(self, inner: Channel, writer: WatchedWriter) -> None:
        self._inner, self._writer = inner, writer

    def write(self, ticket: Ticket, moves: Sequence[BlockMove], deadline: float) -> WriteReceipt:
        self._writer.stop.here(Step.AFTER_GRANT)
        forged, self._writer.forge = self._writer.forge, None
        receipt = self._inner.write(replace(ticket, **forged) if forged else ticket, moves, deadline)
        with self._writer.changed:
            self._writer.placed += len(moves)
            self._writer.changed.notify_all()
        return receipt

    def close(self) -> None:
        self._inner.close()


class HalfWay(ShmChannel):
    """Stops when half of the first block is copied."""

    def __init__(self, stop: Stop, *settings: Any):
        self._stop = stop
        super().__init__(*settings)

    def _copy(self, moves: Sequence[BlockMove], deadline: float) -> None:
        size, first = self._source.layout.block_bytes, moves[0]
        source = self._source.address + first.source * size
        ctypes.memmove(self._target + first.destination * size, source, size // 2)
        self._stop.here(Step.MID_BLOCK)
        super()._copy(moves, deadline)


class WatchedPrefill(PrefillNode):
    """Stops at the steps that a prefill worker takes."""

    def __init__(self, plan: Plan, stop: Stop) -> None:
        super().__init__(plan.name, MemoryNetwork(), plan.settings)
        self._plan, self._stop = plan, stop
        if plan.stop_at is Step.BETWEEN_CHUNKS:
            self.engine.before_step = self._before_step
        if plan.stop_at is Step.BEFORE_COMMIT:
            self._stop_commits()

    def writer(self, kind: str) -> Writer:
        self.watched = WatchedWriter(super().writer(kind), self._stop, self._plan.forge)
        return self.watched

    def _before_step(self, steps: int) -> None:
        if steps == 1:
            self.watched.wait_placed(1)
            self._stop.here(Step.BETWEEN_CHUNKS)

    def _stop_commits(self) -> None:
        send, node = PairStream.send, self

        def watched(stream: PairStream, **body: object) -> int:
            if "commit" in body and node._stop.at is Step.BEFORE_COMMIT:
                node.watched.wait_placed(node._plan.prompt_blocks)
                node._stop.here(Step.BEFORE_COMMIT)
            return send(stream, **body)

        PairStream.send = watched  # type: ignore[assignment,method-assign]


class WatchedDecode(DecodeNode):
    """Stops at the steps that a decode worker takes."""

    def __init__(self, plan: Plan, stop: Stop) -> None:
        super().__init__(plan.name, MemoryNetwork(), plan.settings)
        self._plan, self._stop = plan, stop
        self.aborts: list[str] = []

    def receiver(self, events: ReceiverEvents, kind: str) -> Receiver:
        landed = events.landed

        def late(key: HandoffKey, generation: int, indices: Sequence[int]) -> None:
            self._stop.here(Step.LATE_ANSWER)
            landed(key, generation, indices)

        events.landed = late  # type: ignore[method-assign]
        self.watched = WatchedReceiver(super().receiver(events, kind))
        return self.watched

    def compose(self) -> list[Any]:
        services = super().compose()
        committed, abort = self.streams.committed, self.streams.aborted

        def watched(writer: str, key: HandoffKey) -> None:
            self._stop.here(Step.AFTER_COMMIT)
            committed(writer, key)

        def noted(aborted: Aborted) -> None:
            self.aborts.append(f"{aborted.reason.name}: {aborted.message}")
            abort(aborted)

        self.streams.committed = watched  # type: ignore[method-assign]
        self.streams.aborted = noted  # type: ignore[method-assign]
        return services
