"""Puts one request's tokens into the order of their positions, each once, and turns them into text.

Order and exactly-once hang on the absolute position alone: which worker sent a token, and how often, does not matter.
"""

from __future__ import annotations

from collections.abc import Sequence

from baton.errors import Internal
from baton.spec import TokenLogprobs
from baton.telemetry import Counts
from router.requests.stream import Piece
from router.text.detokenisation import OutputText

GAP_TOKENS = 1024
"""Tokens kept beyond a gap, until what is missing comes."""


class Output:
    """`delivered` tokens have been given out; `stop` is the stop string that matched."""

    def __init__(self, first_position: int, max_tokens: int, text: OutputText, counts: Counts) -> None:
        self._first, self._limit = first_position, max_tokens
        self._text, self._counts = text, counts
        self._beyond: dict[int, tuple[int, TokenLogprobs | None]] = {}
        self.delivered = 0
        self.stop: str | None = None

    def accept(self, position: int, ids: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> Piece | None:
        """What can be given out now that these tokens have come; None when that is nothing.

        Repeated tokens, those past the limit and those past a stop string are dropped and counted. Raises Internal
        when too much has come behind a gap.
        """
        index = position - self._first
        if len(ids) == 1 and index == self.delivered < self._limit and not self._beyond and self.stop is None:
            return self._one(position, ids[0], logprobs)
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
            raise Internal(
                f"{len(self._beyond)} tokens came, but not the one at position {self._first + self.delivered}"
            )
        return piece

    def flush(self) -> Piece | None:
        """The text still held back, at the end of the output; it may complete a stop string."""
        if self.stop is not None:
            return None
        text, self.stop = self._text.flush()
        return Piece(self._first + self.delivered, [], text) if text else None

    def _one(self, position: int, token: int, logprobs: Sequence[TokenLogprobs]) -> Piece:
        """The next token by itself, as nearly all come."""
        self.delivered += 1
        text, self.stop = self._text.push(token)
        return Piece(position, [token], text, list(logprobs))

    def _take(self) -> Piece | None:
        start, ids, texts, logprobs = self._first + self.delivered, [], [], []
        while self.stop is None and self.delivered in self._beyond:
            token, scores = self._beyond.pop(self.delivered)
            self.delivered += 1
            text, self.stop = self._text.push(token)
            ids.append(token)
            texts.append(text)
            if scores is not None:
                logprobs.append(scores)
        if self.stop is not None and self._beyond:
            self._counts.add("surplus_tokens", len(self._beyond))
            self._beyond.clear()
        return Piece(start, ids, "".join(texts), logprobs) if ids else None
