"""From token ids to text, one token at a time, with constant work per token.

A token may end within a character, so text is held back until the character is complete. As in TGI and vLLM, a short
window of tokens is decoded twice, with and without the newest ones; the difference is the new text. The window starts
where text was last complete, so the result equals that of decoding all tokens at once.
"""

from __future__ import annotations

from collections.abc import Set
from typing import Protocol

REPLACEMENT = "\ufffd"
HELD_TOKENS = 32
"""A run of this many tokens none of which ends a character is not text; it is given out as it decodes."""


class Decoder(Protocol):
    """The part of a tokeniser that is used here."""

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str: ...


class WholeTokens(dict[int, str]):
    """The texts of tokens that hold whole characters; empty for other tokens, and those without text.

    For byte-level decoders only: there the bytes of a text are the bytes of its tokens, one after the other. So a whole
    token after complete text adds its own text, whatever came before.
    """

    def __init__(self, decoder: Decoder, vocabulary: int = 0) -> None:
        """Filled up to `vocabulary` at once, so that a router does not grow as it runs: 49,152 tokens take 0.1 s and
        7 MB. Others are added when they come."""
        super().__init__()
        self._decoder = decoder
        for token in range(vocabulary):
            self.__missing__(token)

    def __missing__(self, token: int) -> str:
        text = self._decoder.decode([token], skip_special_tokens=False)
        self[token] = "" if REPLACEMENT in text else text
        return self[token]


class Detokeniser:
    """One request's output text. `skipped` ids (special tokens, stop ids) have no text. `whole` is shared by the
    requests of a model; None where its decoder is not byte-level."""

    def __init__(self, decoder: Decoder, skipped: Set[int], whole: WholeTokens | None = None) -> None:
        self._decoder, self._skipped, self._whole = decoder, skipped, whole
        self._window: list[int] = []
        self._read = 0
        self._read_text = ""

    def push(self, token: int) -> str:
        """The text that this token completes; empty while a character is incomplete."""
        if token in self._skipped:
            return ""
        if self._whole is not None and len(self._window) == self._read and (alone := self._whole[token]):
            if self._window:
                self._window, self._read, self._read_text = [], 0, ""
            return alone
        self._window.append(token)
        text = self._decoder.decode(self._window, skip_special_tokens=False)
        held = len(self._window) - self._read
        if text.endswith(REPLACEMENT) and held < HELD_TOKENS:
            return ""
        return self._take(text)

    def flush(self) -> str:
        """The text held back at the end of the output, as it decodes."""
        if len(self._window) == self._read:
            return ""
        return self._take(self._decoder.decode(self._window, skip_special_tokens=False))

    def _take(self, text: str) -> str:
        new = text[len(self._read_text) :]
        del self._window[: self._read]  # the tokens just read stay as the context of the next ones
        self._read = len(self._window)
        self._read_text = self._decoder.decode(self._window, skip_special_tokens=False)
        return new


class StopMatcher:
    """Finds the first stop string to be completed, holding back text that may become one.

    The result does not depend on how the text is cut into pieces. Of strings completed by the same character the
    longest counts.
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """The text that is certain now, and the stop string that it ends before, if one is complete."""
        if not self._stops:
            return text, None
        buffer = self._held + text
        found = [(start + len(stop), start, stop) for stop in self._stops if (start := buffer.find(stop)) >= 0]
        if found:
            self._held = ""
            _, start, stop = min(found)
            return buffer[:start], stop
        keep = min(_possible_start(buffer, stop) for stop in self._stops)
        self._held = buffer[keep:]
        return buffer[:keep], None

    def flush(self) -> str:
        """The text held back, which has become no stop string."""
        held, self._held = self._held, ""
        return held


class OutputText:
    """The text of one request's output: detokeniser and stop strings together."""

    def __init__(self, detokeniser: Detokeniser, stops: StopMatcher) -> None:
        self._detokeniser, self._stops = detokeniser, stops

    def push(self, token: int) -> tuple[str, str | None]:
        """Text that is certain now, and the stop string that this token completed."""
        text = self._detokeniser.push(token)
        return self._stops.push(text) if text else ("", None)

    def flush(self) -> tuple[str, str | None]:
        """The rest at the end of the output; it too may complete a stop string."""
        text, stop = self._stops.push(self._detokeniser.flush())
        return (text, stop) if stop is not None else (text + self._stops.flush(), None)


def _possible_start(buffer: str, stop: str) -> int:
    """The start of the longest end of `buffer` that `stop` starts with; the buffer's length when there is none."""
    start = buffer.find(stop[0], max(0, len(buffer) - len(stop) + 1))
    while start >= 0:
        if stop.startswith(buffer[start:]):
            return start
        start = buffer.find(stop[0], start + 1)
    return len(buffer)
