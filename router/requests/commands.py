"""Commands to the workers, and the cancels that are not answered yet."""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import Iterable

from baton.messages import BindCommand, CancelCommand, DirectCommand, PrefillCommand
from baton.spec import AttemptKey
from baton.telemetry import Counts
from router.workers.worker import Worker

CANCELLING_LIMIT = 16_384
"""Past it the oldest cancel is forgotten."""


class Commands:
    """Sends without waiting. A cancelled attempt is remembered until each of its workers has answered Freed or is
    lost."""

    def __init__(self, counts: Counts) -> None:
        self._counts = counts
        self.cancelling: OrderedDict[AttemptKey, set[Worker]] = OrderedDict()
        """The workers that have not answered a cancel, by attempt."""
        self._all_freed = asyncio.Event()

    def send(self, worker: Worker, command: PrefillCommand | DirectCommand | BindCommand) -> None:
        worker.link.send(command)

    def cancel(self, workers: Iterable[Worker], attempt: AttemptKey, reason: str) -> None:
        told = {worker for worker in workers if not worker.lost}
        if not told:
            return
        self.cancelling.setdefault(attempt, set()).update(told)
        for worker in told:
            worker.link.send(CancelCommand(attempt, reason))
            self._counts.add("cancels")
        while len(self.cancelling) > CANCELLING_LIMIT:
            self.cancelling.popitem(last=False)
            self._counts.add("cancels_unanswered")

    def freed(self, worker: Worker, attempt: AttemptKey) -> bool:
        """The worker has answered a cancel; False where it owed no answer."""
        waiting = self.cancelling.get(attempt)
        if waiting is None or worker not in waiting:
            return False
        waiting.discard(worker)
        if not waiting:
            del self.cancelling[attempt]
            if not self.cancelling:
                self._all_freed.set()
        return True

    def lost(self, worker: Worker) -> None:
        """Expects no answer of the worker any more."""
        for attempt in list(self.cancelling):
            self.freed(worker, attempt)

    async def wait_freed(self, timeout: float) -> bool:
        """Until every worker has answered every cancel; False after `timeout` seconds."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                while self.cancelling:
                    self._all_freed.clear()
                    await self._all_freed.wait()
        return not self.cancelling


def late(counts: Counts, kind: str) -> None:
    """Counts a message about an attempt that is over, unknown or further on."""
    counts.add("late_messages")
    counts.add(f"late_{kind}")
