"""Long texts waiting for the process that tokenises them: bounded, and in turns between tenants.

    waiting -> in the process -> answered          a client that leaves takes its text out of the queue

A text that the process dies of, or does not end within the limit, is refused with UNAVAILABLE; those that wait go on in
the next process, after a pause that doubles until a text succeeds.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field

import structlog

from baton.errors import BatonError, Internal, ResourceExhausted, Unavailable
from baton.rpc.awake import patience
from baton.telemetry import Counts
from router.clients.preparation import TextModel
from router.clients.text_frames import FrameKind, unpack_error
from router.clients.text_process import TextProcess

WAITING, WAITING_BYTES = 256, 64 * 1024 * 1024
TEXT_LIMIT_S = 30.0
"""The longest text that a request may have takes some ten seconds; after this the process is stuck."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 5.0
RETRY_S = 1.0
log = structlog.get_logger(__name__)


@dataclass(eq=False, slots=True)
class _Text:
    tenant: str
    kind: FrameKind
    model: TextModel
    data: bytes
    answer: asyncio.Future[bytes] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    def fail(self, error: BatonError) -> None:
        if not self.answer.done():
            self.answer.set_exception(error)

    def settle(self, kind: FrameKind, body: bytes) -> None:
        if self.answer.done():
            return  # its client has left
        if kind is FrameKind.DONE:
            self.answer.set_result(body)
        elif kind is FrameKind.REFUSED:
            self.fail(unpack_error(body))
        else:
            log.error("unexpected error in a long text", traceback=body.decode(errors="replace"))
            self.fail(Internal("internal error; the router's log has the details"))


class TextQueue:
    """Owns the process. Lives on one event loop; `close` it."""

    def __init__(self, counts: Counts, limit_s: float = TEXT_LIMIT_S) -> None:
        self.process = TextProcess(counts)
        self._counts, self.limit_s = counts, limit_s
        self._waiting: dict[str, deque[_Text]] = {}
        """By tenant; the tenant whose turn it is comes first."""
        self._serving: asyncio.Task[None] | None = None
        self._pause_s, self._start_at = 0.0, 0.0
        self._closed: BatonError | None = None

    def __len__(self) -> int:
        """Texts that wait."""
        return sum(map(len, self._waiting.values()))

    async def run(self, kind: FrameKind, model: TextModel, data: bytes, tenant: str) -> bytes:
        """The process's answer. Raises its refusal, ResourceExhausted when the queue is full, and Unavailable when the
        process was lost with this text."""
        if self._closed is not None:
            raise self._closed
        self._make_room(tenant, len(data))
        text = _Text(tenant, kind, model, data)
        self._waiting.setdefault(tenant, deque()).append(text)
        self._counts.add("long_texts")
        if self._serving is None or self._serving.done():
            self._serving = asyncio.create_task(self._serve(), name="long texts")
        try:
            return await text.answer
        finally:
            self._leave(text)

    async def close(self, error: BatonError) -> None:
        """Refuses all that wait, and later ones, with this error, and ends the process. Idempotent."""
        self._closed = error
        if self._serving is not None:
            self._serving.cancel()
            await asyncio.wait([self._serving])
        for text in [text for texts in self._waiting.values() for text in texts]:
            text.fail(error)
        await self.process.kill()

    def _make_room(self, tenant: str, size: int) -> None:
        """Takes out the last text of the tenant with most, where this one has fewer. Raises ResourceExhausted."""
        waiting = self._waiting
        while len(self) >= WAITING or self._bytes() + size > WAITING_BYTES:
            refused = ResourceExhausted(f"{len(self)} long texts wait to be tokenised", RETRY_S, "tokenise")
            self._counts.add("long_texts_refused")
            most = max(waiting, key=lambda name: len(waiting[name]))
            if len(waiting[most]) <= len(waiting.get(tenant, ())) + 1:
                raise refused
            last = waiting[most][-1]
            last.fail(refused)
            self._leave(last)

    def _bytes(self) -> int:
        return sum(len(text.data) for texts in self._waiting.values() for text in texts)

    def _leave(self, text: _Text) -> None:
        texts = self._waiting.get(text.tenant)
        if texts is not None and text in texts:
            texts.remove(text)
            if not texts:
                del self._waiting[text.tenant]

    def _next(self) -> _Text:
        """The first text of the first tenant, who goes to the end."""
        tenant = next(iter(self._waiting))
        texts = self._waiting.pop(tenant)
        text = texts.popleft()
        if texts:
            self._waiting[tenant] = texts
        return text

    async def _serve(self) -> None:
        """Until no text waits."""
        loop = asyncio.get_running_loop()
        while self._waiting:
            if self.process.pid is None:
                await asyncio.sleep(self._start_at - loop.time())
                if not self._waiting:
                    return
            text = self._next()
            try:
                async with patience(self.limit_s):
                    kind, body = await self.process.ask(text.kind, text.model, text.data)
            except asyncio.CancelledError:
                text.fail(self._closed or Unavailable("the router is shutting down"))
                raise
            except TimeoutError:
                log.error("a long text was not done in time", bytes=len(text.data), limit_s=self.limit_s)
                await self._lost(text, f"was not done within {self.limit_s:g} s")
            except (OSError, EOFError) as error:
                log.error("the process for long texts is lost", bytes=len(text.data), reason=str(error))
                await self._lost(text, "ended the process that tokenises it")
            except Exception as error:
                log.error("unexpected error with the process for long texts", exc_info=error)
                await self._lost(text, "ended the process that tokenises it")
            else:
                self._pause_s = 0.0
                text.settle(kind, body)

    async def _lost(self, text: _Text, how: str) -> None:
        self._counts.add("long_texts_lost")
        text.fail(Unavailable(f"the text {how}", RETRY_S, "tokenise"))
        self._pause_s = min(max(FIRST_PAUSE_S, 2 * self._pause_s), LONGEST_PAUSE_S)
        self._start_at = asyncio.get_running_loop().time() + self._pause_s
        await self.process.kill()
