"""One request's tokens on their way from the workers' frames to its client.

`Output` puts them in order, each once: both depend on the absolute position alone, whichever worker sent a token, and
however often. `ClientStream` is a bounded buffer whose `push` never waits. A client that reads slowly gets larger
pieces; one that does not read at all is given up at a limit, with an error that names it.

    OPEN -> ENDING (an end is queued behind the tokens) -> ENDED

A token costs no wake-up of a task: `push` starts the write, and the end of one write starts the next. The call's
handler sleeps from the first event to the last.
"""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

from baton.errors import BatonError, Internal, ResourceExhausted
from baton.spec import TokenLogprobs
from baton.telemetry import Counts
from router.requests.timeline import Outcome
from router.text.detokenisation import OutputText

GAP_TOKENS = 1024
"""Tokens kept beyond a gap, until the missing ones come."""
Send = Callable[["Piece"], Coroutine[Any, None, None]]


@dataclass(slots=True)
class Piece:
    """Consecutive tokens on their way to the client; `position` is that of ids[0]."""

    position: int
    ids: list[int]
    text: str
    logprobs: list[TokenLogprobs] = field(default_factory=list)


class Output:
    """`stop` is the stop string that matched."""

    def __init__(self, first_position: int, max_tokens: int, text: OutputText, counts: Counts) -> None:
        self._first, self._limit = first_position, max_tokens
        self._text, self._counts = text, counts
        self._beyond: dict[int, tuple[int, TokenLogprobs | None]] = {}
        self._ids = array("I")
        self.stop: str | None = None

    @property
    def delivered(self) -> int:
        """Tokens that were returned."""
        return len(self._ids)

    @property
    def ids(self) -> tuple[int, ...]:
        """Those tokens, from which another attempt goes on."""
        return tuple(self._ids)

    def forget_beyond(self) -> None:
        """Another attempt goes on: what the former one drew beyond a gap must not mix with what this one draws."""
        self._beyond.clear()

    def accept(self, position: int, ids: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> Piece | None:
        """The tokens that are next in order, if any.

        Repeated tokens, those past the limit and those past a stop string are dropped and counted. Raises Internal
        when too many have come behind a gap.
        """
        index = position - self._first
        if len(ids) == 1 and index == len(self._ids) < self._limit and not self._beyond and self.stop is None:
            self._ids.append(ids[0])  # the usual case
            text, self.stop = self._text.push(ids[0])
            return Piece(position, [ids[0]], text, list(logprobs))
        for offset, token in enumerate(ids):
            index = position + offset - self._first
            if index < self.delivered or index in self._beyond:
                self._counts.add("repeated_tokens")
            elif self.stop is not None or index >= self._limit:
                self._counts.add("surplus_tokens")
            else:
                self._beyond[index] = (token, logprobs[offset] if logprobs else None)
        piece = self._take()
        if len(self._beyond) > GAP_TOKENS:
            missing = self._first + self.delivered
            raise Internal(f"{len(self._beyond)} tokens came, but not the one at position {missing}")
        return piece

    def flush(self) -> Piece | None:
        """The text held back at the end of the output; it may complete a stop string."""
        if self.stop is not None:
            return None
        text, self.stop = self._text.flush()
        return Piece(self._first + self.delivered, [], text) if text else None

    def _take(self) -> Piece | None:
        start, ids, texts, logprobs = self._first + self.delivered, [], [], []
        while self.stop is None and self.delivered in self._beyond:
            token, scores = self._beyond.pop(self.delivered)
            self._ids.append(token)
            text, self.stop = self._text.push(token)
            ids.append(token)
            texts.append(text)
            if scores is not None:
                logprobs.append(scores)
        if self.stop is not None and self._beyond:
            self._counts.add("surplus_tokens", len(self._beyond))
            self._beyond.clear()
        return Piece(start, ids, "".join(texts), logprobs) if ids else None


class ClientStream:
    """One request's output, filled by the state machine and written while `deliver` runs."""

    def __init__(self, limit_tokens: int) -> None:
        self._limit = limit_tokens
        self._piece: Piece | None = None
        self._outcome: Outcome | None = None
        self.error: BatonError | None = None
        """The bad end, if there was one."""
        self._broken: BaseException | None = None
        self._wake = asyncio.Event()
        self._send: Send | None = None
        self._write: Coroutine[Any, None, None] | None = None
        self.interrupt: Callable[[], None] | None = None
        """Called by `cut`: the task of `deliver` may be stuck in a write to a client that does not read."""

    @property
    def buffered_tokens(self) -> int:
        return len(self._piece.ids) if self._piece is not None else 0

    def push(self, piece: Piece) -> None:
        """Adds tokens at the end. Raises ResourceExhausted when the client is too far behind."""
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
        self.error = error
        self._wake.set()

    def cut(self, error: BatonError) -> None:
        """The bad end, at once; drops the buffered tokens."""
        self._piece = None
        self.fail(error)
        if self.interrupt is not None:
            self.interrupt()

    async def deliver(self, send: Send) -> Outcome:
        """Writes the pieces, then returns the good end or raises the bad one. `send` makes the coroutine of one write,
        whose exceptions are raised here. Bounded by the request's own deadline, at which the state machine ends it."""
        self._send = send
        self._next()
        try:
            while self._broken is None and (self._write is not None or not self._ended):
                self._wake.clear()
                await self._wake.wait()
        finally:
            self._send = None
        if (error := self._broken or self.error) is not None:
            raise error
        assert self._outcome is not None, "the loop ends with one of the three"
        return self._outcome

    def _next(self) -> None:
        """Starts the write of the buffered tokens, while `deliver` runs."""
        if self._piece is None or self._send is None:
            return
        piece, self._piece = self._piece, None
        self._write = self._send(piece)
        self._advance()

    def _advance(self, _done: object = None) -> None:
        """Runs the write until it waits for the wire or ends. It is a coroutine without a task: gRPC's writes wait for
        one future each, whose completion calls this again."""
        assert self._write is not None, "a write is under way"
        try:
            waiting = self._write.send(None)
        except StopIteration:
            self._write = None
            self._next()
            if self._write is None and self._ended:
                self._wake.set()
        except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 (`deliver` raises it)
            self._write, self._broken = None, error
            self._wake.set()
        else:
            waiting.add_done_callback(self._advance)

    @property
    def _ended(self) -> bool:
        return self.error is not None or self._outcome is not None
