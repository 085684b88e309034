"""The control streams of the prefill workers that send to this worker."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import structlog

from baton import errors
from baton.spec import HandoffKey, ProcessRef
from baton.v1 import transfer_pb2 as wire
from kvtransfer.handoffs.messages import Aborted, Grant, Refusal, WaitNotice

OUTGOING_LIMIT = 10_000
log = structlog.get_logger(__name__)


class WriterStream:
    """One writer's control stream. `error` is set where the writer's fault ended it."""

    def __init__(self, process: ProcessRef) -> None:
        self.process = process
        self.error: errors.BatonError | None = None
        self._outgoing: asyncio.Queue[wire.ReceiverFrame | None] = asyncio.Queue()
        self._ended = False

    def send(self, **body: Any) -> None:
        """Queues a frame. Cuts off a writer that leaves `OUTGOING_LIMIT` frames unread: it asks again later."""
        if self._ended:
            return
        if self._outgoing.qsize() < OUTGOING_LIMIT:
            self._outgoing.put_nowait(wire.ReceiverFrame(**body))
        else:
            log.warning("a writer does not read; stream ended", writer=self.process.name)
            self.end()

    def answer(self, answer: Grant | WaitNotice | Refusal) -> None:
        """To an Open."""
        match answer:
            case Grant():
                self.send(grant=_grant(answer))
            case WaitNotice(key, ahead, expected_s):
                waiting = wire.Waiting(
                    attempt=key.attempt, handoff=key.handoff, ahead=ahead, expected_ms=expected_s * 1e3
                )
                self.send(waiting=waiting)
            case Refusal():
                self.send(refused=_refused(answer))

    def end(self) -> None:
        if not self._ended:
            self._ended = True
            self._outgoing.put_nowait(None)

    async def outgoing(self) -> AsyncIterator[wire.ReceiverFrame]:
        while (frame := await self._outgoing.get()) is not None:
            yield frame


class WriterStreams:
    """The streams by their writers' incarnations. A writer without one asks again when it is back."""

    def __init__(self) -> None:
        self._streams: dict[str, WriterStream] = {}

    def __len__(self) -> int:
        return len(self._streams)

    def __iter__(self) -> Iterator[WriterStream]:
        return iter(list(self._streams.values()))

    def add(self, stream: WriterStream) -> None:
        """Replaces an older stream of the same writer."""
        self._streams[stream.process.incarnation] = stream

    def discard(self, stream: WriterStream) -> None:
        """Does nothing when a newer stream has replaced this one."""
        if self.is_current(stream):
            del self._streams[stream.process.incarnation]

    def is_current(self, stream: WriterStream) -> bool:
        return self._streams.get(stream.process.incarnation) is stream

    def committed(self, writer: str, key: HandoffKey) -> None:
        if (stream := self._streams.get(writer)) is not None:
            stream.send(committed=wire.Committed(attempt=key.attempt, handoff=key.handoff))

    def answered(self, writer: str, answer: Grant | Refusal) -> None:
        """Answers an Open that has waited."""
        if (stream := self._streams.get(writer)) is not None:
            stream.answer(answer)

    def aborted(self, aborted: Aborted) -> None:
        """Tells the writer to stop writing and to answer with a close."""
        key = aborted.grant.key
        if (stream := self._streams.get(aborted.grant.writer)) is not None:
            notice = wire.AbortNotice(attempt=key.attempt, handoff=key.handoff, message=aborted.message)
            notice.reason = aborted.reason.value  # type: ignore[assignment]  # the same numbers
            stream.send(abort=notice)

    def end(self) -> None:
        for stream in self._streams.values():
            stream.end()


def _grant(grant: Grant) -> wire.Grant:
    return wire.Grant(
        attempt=grant.key.attempt,
        handoff=grant.key.handoff,
        generation=grant.generation,
        blocks=grant.ticket.blocks,
        cached_blocks=grant.ticket.cached_blocks,
        write_token=grant.ticket.write_token,
    )


def _refused(refusal: Refusal) -> wire.Refused:
    message = wire.Refused(attempt=refusal.key.attempt, handoff=refusal.key.handoff, message=refusal.message)
    message.reason = refusal.reason.value  # type: ignore[assignment]  # the same numbers
    if refusal.retry_after_s is not None:
        message.retry_after_ms = refusal.retry_after_s * 1e3
    return message
