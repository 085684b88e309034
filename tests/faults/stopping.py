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
from decode_worker.events import LoopEvents
from kvtransfer.blocks.copying import copy_runs
from kvtransfer.handoffs.messages import Aborted, Ticket
from kvtransfer.transports.base import BlockMove, Channel, Transport, WriteReceipt
from kvtransfer.transports.memory import MemoryNetwork
from kvtransfer.transports.shm.transport import ShmTransport
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


class WatchedTransport:
    """A transport between whose calls the process can be stopped. `endpoint_` takes the place of a receiver's own."""

    def __init__(self, inner: Transport, stop: Stop, forge: dict[str, Any] | None) -> None:
        self.inner, self.stop, self.forge = inner, stop, forge
        self.endpoint_ = ""
        self.placed = 0
        self.changed = threading.Condition()

    @property
    def kind(self) -> str:
        return self.inner.kind

    @property
    def revoke_proves(self) -> bool:
        return self.inner.revoke_proves

    def endpoint(self) -> str:
        return self.endpoint_ or self.inner.endpoint()

    def connect(self, endpoint: str, peer: ProcessRef, deadline: float) -> Channel:
        return WatchedChannel(self.inner.connect(endpoint, peer, deadline), self)

    def admit(self, ticket: Ticket) -> None:
        self.inner.admit(ticket)

    def revoke(self, key: HandoffKey) -> None:
        self.inner.revoke(key)

    def close(self) -> None:
        self.inner.close()

    def wait_placed(self, blocks: int) -> None:
        """Until so many blocks of all writes are in place."""
        with self.changed:
            assert self.changed.wait_for(lambda: self.placed >= blocks, GENEROUS), "the writes did not end"


class WatchedChannel:
    """A channel of such a transport."""

    def __init__(self, inner: Channel, transport: WatchedTransport) -> None:
        self._inner, self._transport = inner, transport

    def write(self, ticket: Ticket, moves: Sequence[BlockMove], deadline: float) -> WriteReceipt:
        self._transport.stop.here(Step.AFTER_GRANT)
        forged, self._transport.forge = self._transport.forge, None
        receipt = self._inner.write(replace(ticket, **forged) if forged else ticket, moves, deadline)
        with self._transport.changed:
            self._transport.placed += len(moves)
            self._transport.changed.notify_all()
        return receipt

    def close(self) -> None:
        self._inner.close()


class HalfWay:
    """A block copy that stops when half of the first block is copied."""

    def __init__(self, stop: Stop) -> None:
        self._stop = stop

    def __call__(self, target: int, source: int, targets: Sequence[int], sources: Sequence[int], size: int) -> None:
        if self._stop.at is Step.MID_BLOCK:
            ctypes.memmove(target + targets[0] * size, source + sources[0] * size, size // 2)
            self._stop.here(Step.MID_BLOCK)
        copy_runs(target, source, targets, sources, size)


class WatchedPrefill(PrefillNode):
    """Stops at the steps that a prefill worker takes."""

    def __init__(self, plan: Plan, stop: Stop) -> None:
        super().__init__(plan.name, MemoryNetwork(), plan.settings)
        self._plan, self._stop = plan, stop
        if plan.stop_at is Step.BETWEEN_CHUNKS:
            self.engine.before_step = self._before_step
        if plan.stop_at is Step.BEFORE_COMMIT:
            self._stop_commits()

    def _transport(self, events: LoopEvents | None) -> Transport:
        inner = super()._transport(events)
        if isinstance(inner, ShmTransport):
            inner = ShmTransport(self.memory, self.process.incarnation, events, HalfWay(self._stop))
        self.watched = WatchedTransport(inner, self._stop, self._plan.forge)
        return self.watched

    def _before_step(self, steps: int) -> None:
        if steps == 1:
            self.watched.wait_placed(1)
            self._stop.here(Step.BETWEEN_CHUNKS)

    def _stop_commits(self) -> None:
        send, stop, blocks = PairStream.send, self._stop, self._plan.prompt_blocks

        def watched(stream: PairStream, **body: object) -> int:
            if "commit" in body and stop.at is Step.BEFORE_COMMIT:
                self.watched.wait_placed(blocks)
                stop.here(Step.BEFORE_COMMIT)
            return send(stream, **body)

        PairStream.send = watched  # type: ignore[assignment,method-assign]


class WatchedDecode(DecodeNode):
    """Stops at the steps that a decode worker takes."""

    def __init__(self, plan: Plan, stop: Stop) -> None:
        super().__init__(plan.name, MemoryNetwork(), plan.settings)
        self._plan, self._stop = plan, stop
        self.aborts: list[str] = []

    def _transport(self, events: LoopEvents | None) -> Transport:
        assert events is not None
        landed = events.landed

        def late(key: HandoffKey, generation: int, indices: Sequence[int]) -> None:
            self._stop.here(Step.LATE_ANSWER)
            landed(key, generation, indices)

        events.landed = late  # type: ignore[method-assign]
        self.watched = WatchedTransport(super()._transport(events), self._stop, None)
        return self.watched

    def compose(self) -> list[Any]:
        services = super().compose()
        committed, abort = self.transfer.committed, self.transfer.aborted

        def watched(writer: str, key: HandoffKey) -> None:
            self._stop.here(Step.AFTER_COMMIT)
            committed(writer, key)

        def noted(writer: str, aborted: Aborted) -> None:
            self.aborts.append(f"{aborted.reason.name}: {aborted.message}")
            abort(writer, aborted)

        self.transfer.committed = watched  # type: ignore[method-assign]
        self.transfer.aborted = noted  # type: ignore[method-assign]
        return services
