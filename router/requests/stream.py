"""The bounded buffer between the workers' frames and one client, and the writing of it.

`push` never waits. A client that reads slowly gets larger pieces; one that does not read at all is given up at a limit,
with an error that names it.

    OPEN -> ENDING (an end is queued behind the tokens) -> ENDED

A token costs no wake-up of a task: `push` starts the write, and the end of one write starts the next. The call's
handler sleeps from the first event to the last.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

from baton.errors import BatonError, ResourceExhausted
from baton.spec import TokenLogprobs
from router.requests.timeline import Outcome

Send = Callable[["Piece"], Coroutine[Any, None, None]]


@dataclass(slots=True)
class Piece:
    """Consecutive tokens on their way to the client; `position` is that of ids[0]."""

    position: int
    ids: list[int]
    text: str
    logprobs: list[TokenLogprobs] = field(default_factory=list)


class ClientStream:
    """One request's output, filled by the state machine and written out while `deliver` runs."""

    def __init__(self, limit_tokens: int) -> None:
        self._limit = limit_tokens
        self._piece: Piece | None = None
        self._outcome: Outcome | None = None
        self._error: BatonError | None = None
        self._broken: BaseException | None = None
        self._wake = asyncio.Event()
        self._send: Send | None = None
        self._write: Coroutine[Any, None, None] | None = None
        self.interrupt: Callable[[], None] | None = None
        """Called when the stream is cut off; the reader may be stuck in a write to a client that does not read."""

    @property
    def buffered_tokens(self) -> int:
        """Tokens that the client has not been given."""
        return len(self._piece.ids) if self._piece is not None else 0

    @property
    def error(self) -> BatonError | None:
        """The bad end, if there was one."""
        return self._error

    def push(self, piece: Piece) -> None:
        """Adds tokens behind the others. Raises ResourceExhausted when the client is too far behind."""
        if self._piece is None:
            self._piece = piece
        else:
            self._piece.ids += piece.ids
            self._piece.text += piece.text
            self._piece.logprobs += piece.logprobs
        if self._write is None:
            self._next()
        if self.buffered_tokens > self._limit:
            raise ResourceExhausted(
                f"the client has not read for {self.buffered_tokens} tokens", constraint="client_buffer"
            )

    def finish(self, outcome: Outcome) -> None:
        """The good end, behind the tokens."""
        self._outcome = outcome
        self._wake.set()

    def fail(self, error: BatonError) -> None:
        """The bad end, behind the tokens."""
        self._error = error
        self._wake.set()

    def cut(self, error: BatonError) -> None:
        """The bad end, at once; what is buffered is dropped."""
        self._piece = None
        self.fail(error)
        if self.interrupt is not None:
            self.interrupt()

    async def deliver(self, send: Send) -> Outcome:
        """Writes the pieces until the end, which is returned or raised once they are out. `send` makes the coroutine
        of one write; what that raises is raised here.

        Bounded by the request's own deadline, at which the state machine ends it.
        """
        self._send = send
        self._next()
        try:
            while self._broken is None and (self._write is not None or (self._error is None and self._outcome is None)):
                self._wake.clear()
                await self._wake.wait()
        finally:
            self._send = None
        if (error := self._broken or self._error) is not None:
            raise error
        assert self._outcome is not None, "the loop ends with one of the three"
        return self._outcome

    def _next(self) -> None:
        """Starts the write of what is buffered, while `deliver` runs."""
        if self._piece is None or self._send is None:
            return
        piece, self._piece = self._piece, None
        self._write = self._send(piece)
        self._advance()

    def _advance(self, _done: object = None) -> None:
        """Runs the write to where it waits for the wire, or to its end. It is a coroutine without a task: gRPC's
        writes wait for one future each, whose completion comes here again."""
        assert self._write is not None, "a write is under way"
        try:
            waiting = self._write.send(None)
        except StopIteration:
            self._write = None
            self._next()
            if self._write is None:
                self._ended()
        except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 (`deliver` raises it)
            self._write, self._broken = None, error
            self._wake.set()
        else:
            waiting.add_done_callback(self._advance)

    def _ended(self) -> None:
        if self._error is not None or self._outcome is not None:
            self._wake.set()
