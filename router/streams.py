"""The bounded buffer between the workers' frames and one client.

Whoever brings tokens never waits. A client that reads slowly gets them in larger pieces; one that does not read at all
is given up at a limit, with an error that names it.

    OPEN -> ENDING (an end is queued behind the tokens) -> ENDED
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from baton.errors import BatonError, ResourceExhausted
from baton.spec import TokenLogprobs
from router.timeline import Outcome


@dataclass(slots=True)
class Piece:
    """Consecutive tokens on their way to the client; `position` is that of ids[0]."""

    position: int
    ids: list[int]
    text: str
    logprobs: list[TokenLogprobs] = field(default_factory=list)


class ClientStream:
    """One request's output, written by the state machine and read by the handler of its call."""

    def __init__(self, limit_tokens: int) -> None:
        self._limit = limit_tokens
        self._piece: Piece | None = None
        self._outcome: Outcome | None = None
        self._error: BatonError | None = None
        self._wake = asyncio.Event()
        self.interrupt: Callable[[], None] | None = None
        """Called when the stream is cut off; the reader may be stuck in a write to a client that does not read."""

    @property
    def buffered_tokens(self) -> int:
        """Tokens that the client has not been given."""
        return len(self._piece.ids) if self._piece is not None else 0

    def push(self, piece: Piece) -> None:
        """Adds tokens behind the others. Raises ResourceExhausted when the client is too far behind."""
        if self._piece is None:
            self._piece = piece
        else:
            self._piece.ids += piece.ids
            self._piece.text += piece.text
            self._piece.logprobs += piece.logprobs
        self._wake.set()
        if len(self._piece.ids) > self._limit:
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

    async def next(self) -> Piece | Outcome:
        """The next piece, or the outcome, after which nothing comes. Raises the error that ended the request.

        Bounded by the request's own deadline, at which the state machine ends it.
        """
        while True:
            if self._piece is not None:
                piece, self._piece = self._piece, None
                return piece
            if self._error is not None:
                raise self._error
            if self._outcome is not None:
                return self._outcome
            self._wake.clear()
            await self._wake.wait()
