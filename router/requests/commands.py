"""What this router tells its workers about attempts, and the cancels that are not answered yet."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Iterable

from baton.messages import BindCommand, CancelCommand, DirectCommand, PrefillCommand
from baton.spec import AttemptKey, HandoffKey, SequenceSpec
from baton.telemetry import Counts
from router.workers.worker import Worker

CANCELLING_LIMIT = 16_384
"""Past it the oldest cancel is no longer waited for."""


class Commands:
    """Sends commands; never waits. A cancelled attempt is remembered until every worker that was told has answered
    Freed or is lost."""

    def __init__(self, counts: Counts) -> None:
        self._counts = counts
        self._cancelling: OrderedDict[AttemptKey, set[Worker]] = OrderedDict()
        self._all_freed = asyncio.Event()

    @property
    def cancelling(self) -> int:
        """Attempts whose cancel is not answered by every worker."""
        return len(self._cancelling)

    def prompt(self, worker: Worker, spec: SequenceSpec, *, direct: bool) -> None:
        """Queues the prompt at the worker; `direct`: to be decoded there too."""
        worker.link.send(DirectCommand(spec) if direct else PrefillCommand(spec))

    def bind(self, worker: Worker, key: HandoffKey, decode: Worker) -> None:
        """Tells the prefill worker where the blocks go."""
        worker.link.send(BindCommand(key, decode.process))

    def cancel(self, workers: Iterable[Worker], attempt: AttemptKey, reason: str) -> None:
        """Makes the workers forget the attempt."""
        told = {worker for worker in workers if not worker.lost}
        if not told:
            return
        self._cancelling.setdefault(attempt, set()).update(told)
        for worker in told:
            worker.link.send(CancelCommand(attempt, reason))
            self._counts.add("cancels")
        while len(self._cancelling) > CANCELLING_LIMIT:
            self._cancelling.popitem(last=False)
            self._counts.add("cancels_unanswered")

    def freed(self, worker: Worker, attempt: AttemptKey) -> bool:
        """The worker has answered a cancel; False where it owed no answer."""
        waiting = self._cancelling.get(attempt)
        if waiting is None or worker not in waiting:
            return False
        waiting.discard(worker)
        if not waiting:
            del self._cancelling[attempt]
            if not self._cancelling:
                self._all_freed.set()
        return True

    def lost(self, worker: Worker) -> None:
        """The worker answers no cancel any more."""
        for attempt in list(self._cancelling):
            self.freed(worker, attempt)

    async def wait_freed(self, timeout: float) -> bool:
        """Until every worker has answered every cancel; False after `timeout` seconds."""
        try:
            async with asyncio.timeout(timeout):
                while self._cancelling:
                    self._all_freed.clear()
                    await self._all_freed.wait()
        except TimeoutError:
            return False
        return True
