"""What a step's results become: frames for the routers, and a boundary around each sequence's own."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import structlog

from baton.v1 import worker_pb2 as wire
from baton.worker.service import RouterSession

T = TypeVar("T")
log = structlog.get_logger(__name__)


class TokenFrames:
    """The tokens of one step, gathered into one frame for each router."""

    def __init__(self) -> None:
        self._runs: dict[int, tuple[RouterSession, list[wire.TokenRun]]] = {}

    def add(self, router: RouterSession, run: wire.TokenRun) -> None:
        """Tokens for this router."""
        self._runs.setdefault(id(router), (router, []))[1].append(run)

    def send(self) -> None:
        """Queues the frames."""
        for router, runs in self._runs.values():
            router.send(tokens=wire.TokenFrame(runs=runs))


def for_each(items: Iterable[T], act: Callable[[T], None], fail: Callable[[T, str], None]) -> None:
    """Calls `act` with each item. Where that raises, `fail` gets the item and the reason, and the others go on: one
    sequence's trouble must not cost the rest of its step their tokens."""
    for item in items:
        try:
            act(item)
        except Exception as error:
            log.error("a step's result could not be handled", exc_info=error)
            try:
                fail(item, f"{type(error).__name__}: {error}")
            except Exception as second:
                log.error("and its sequence could not be ended", exc_info=second)
