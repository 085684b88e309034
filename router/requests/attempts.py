"""A request's attempts, one after another, and what ends them for good.

    first --its only copy is lost, or its room--> over; the next waits for its turn --placed--> next ...

An attempt goes on where the tokens of the former ones end. At most ATTEMPTS may be lost; one that was preempted, on a
decode worker whose pool ran dry, does not count. A request whose attempts met the death of two workers may be what
kills them: it is not tried on a third.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import structlog

from baton.errors import Internal
from baton.spec import AttemptKey
from baton.telemetry import Counts
from router.placement.policy import Plan
from router.requests.admitted import Admitted
from router.requests.attempt import Attempt, AttemptState
from router.requests.commands import Commands
from router.requests.failures import CopyLost
from router.requests.placer import Back, Placer
from router.requests.timeline import FormerAttempt, Path
from router.workers.registry import LEFT
from router.workers.worker import Worker

ATTEMPTS, DEATHS = 3, 2
"""Attempts of a request, and deaths of workers that had it, at most."""
log = structlog.get_logger(__name__)


class Attempts:
    """`current` is the latest one; `number` counts from 1."""

    def __init__(self, admitted: Admitted, placer: Placer, commands: Commands, counts: Counts) -> None:
        """Places the first attempt; raises as `Placer.place`."""
        self._admitted, self._placer, self._commands, self._counts = admitted, placer, commands, counts
        self._deaths: list[str] = []
        """Workers that died while they had the request, or may have had it."""
        self._former: list[FormerAttempt] = []
        self.number, self.preemptions = 1, 0
        self.current = self._made(admitted, *placer.place(admitted))
        self.renamed: Callable[[AttemptKey, AttemptKey], None] = lambda former, new: None
        """Called with the keys of the former and the new attempt before that is started."""

    @property
    def between(self) -> bool:
        """The current attempt is over; the next one, or the request's end, follows."""
        return self.current.state is AttemptState.OVER

    @property
    def exhausted(self) -> bool:
        """Whether no more of them may be lost."""
        return self.number - self.preemptions >= ATTEMPTS

    @property
    def facts(self) -> dict[str, Any]:
        """Fields of the request's Outcome."""
        current = self.current
        decode = _decode_worker(current)
        return {
            "prefill": current.report,
            "attempts": self.number,
            "former": tuple(self._former),
            "preemptions": self.preemptions,
            "handoffs": sum(former.handoffs for former in self._former) + current.handoffs,
            "prefill_worker": current.prefill.name,
            "decode_worker": decode,
            "path": Path.DIRECT if current.direct else Path.DISAGGREGATED if decode else Path.PREFILL_ONLY,
            "simulated": current.prefill.card.simulated,
        }

    def lost(self, worker: Worker, reason: str) -> None:
        """A worker is lost. Raises CopyLost where the attempt can't go on, and Internal after the second death."""
        if reason != LEFT and self.current.may_be_at(worker):
            self._deaths.append(worker.name)
        if len(self._deaths) >= DEATHS:
            self.current.holding.discard(worker)
            self._counts.add("requests_poisonous")
            died = " and ".join(self._deaths)
            raise Internal(f"workers {died} died while they had this request; it is not tried again")
        if self.between:
            self.current.holding.discard(worker)
        else:
            self.current.lost(worker, reason)

    def retire(self, error: CopyLost) -> None:
        """Ends the current attempt. Raises the error where it was the last one."""
        if self.exhausted:
            raise error
        self.current.cancel("failed over")
        self.current.close()

    def preempted(self, worker: Worker) -> bool:
        """The current attempt lost its room on the worker, and is over; false where that is not news."""
        if self.between or not self.current.preempted(worker):
            return False
        self.preemptions += 1
        self._counts.add("preemptions")
        self.current.cancel("preempted")
        self.current.close()
        return True

    def start_next(self, output: tuple[int, ...], why: str, back_at: Back | None = None) -> None:
        """Places and starts the next attempt, which goes on after `output`; ends the current one. `back_at` may still
        have the blocks of a preempted one. Raises as `Placer.place`, without a change."""
        former, again = self.current, self._admitted.again(output, self.preemptions)
        worker, plan = self._placer.place_again(again, back_at)
        workers, left_s = (former.prefill.name, _decode_worker(former)), self._placer.clock() - again.arrived
        if not self.between:
            former.cancel("failed over")
            former.close()
        self.number += 1
        self._former.append(FormerAttempt(*workers, former.handoffs, len(output), left_s * 1e3, why))
        self.current = self._made(again, worker, plan)
        self.renamed(former.key, self.current.key)
        if back_at is None:
            self._counts.add("failovers")
            event = "failed over"
        else:
            event = "goes on after it was preempted"
        label, key = self._admitted.spec.request_id, self.current.key.hex()[:12]
        log.info(event, request_id=label, attempt=key, to=worker.name, tokens=len(output), why=why)
        self.current.start()

    def _made(self, admitted: Admitted, worker: Worker, plan: Plan) -> Attempt:
        return Attempt(admitted, worker, plan, self._placer, self._commands, self._counts)


def _decode_worker(attempt: Attempt) -> str:
    """Its name; empty where the sequence did not come to one."""
    came = attempt.state in (AttemptState.DECODING, AttemptState.OVER)
    return attempt.decode.name if came and attempt.decode is not None else ""
