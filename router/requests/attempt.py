"""One attempt at a request: its key, the workers it named, and what each may still hold of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from baton.errors import BatonError
from baton.spec import AttemptKey, HandoffKey
from router.placement.snapshot import Demand
from router.requests.handoff import UNCERTAIN, Handoffs, Refusal
from router.requests.timeline import PrefillTimes, Reason
from router.workers.worker import Worker


@dataclass(frozen=True, slots=True)
class End:
    """A worker's word that a sequence is over. `error` is set when it did not end well, else `reason`.

    `output_tokens` counts all output of the sequence, so that it can be seen whether all has come.
    """

    reason: Reason | None
    error: BatonError | None
    output_tokens: int
    first_step_wait_ms: float | None = None
    decode_ms: float | None = None


@dataclass(slots=True)
class Attempt:
    """Keeps the workers' ledgers in step with what the attempt has asked for.

    `holding` are the workers that may hold something of it: those that a cancel must reach. `times` is the prefill
    worker's report; with it, its blocks are free.
    """

    key: AttemptKey
    prefill: Worker
    decode: Worker | None = None
    handoffs: Handoffs = field(default_factory=Handoffs)
    holding: set[Worker] = field(default_factory=set)
    times: PrefillTimes | None = None
    _left: dict[str, Worker] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.holding.add(self.prefill)

    @property
    def direct(self) -> bool:
        """Computed and decoded on one worker."""
        return self.decode is self.prefill

    def stay(self, demand: Demand, tpot_s: float | None) -> None:
        """The worker that computes the prompt decodes it too."""
        self.decode = self.prefill
        self.prefill.decode.bind(self.key, demand, self.prefill.keepable(tpot_s))

    def bind(self, worker: Worker, demand: Demand, tpot_s: float | None) -> tuple[HandoffKey, Worker | None]:
        """The next handoff goes to `worker`. Also returns a worker that must be told to forget the attempt."""
        self.unbind()
        self.decode = worker
        self.holding.add(worker)
        worker.decode.bind(self.key, demand, worker.keepable(tpot_s))
        leave = self.handoffs.bound(worker.process.incarnation)
        left = None if leave is None else self._left.pop(leave, None)
        self.holding -= {left}
        return HandoffKey(self.key, self.handoffs.number), left

    def refused(self, worker: Worker, reason: Refusal, message: str, retry_after_s: float | None) -> float:
        """The current handoff came to nothing. Returns how long to wait before asking the same worker again."""
        self.unbind()
        if reason in UNCERTAIN:
            self._left[worker.process.incarnation] = worker
            self.holding.add(worker)
        return self.handoffs.failed(worker.process.incarnation, reason, message, retry_after_s)

    def readopt(self, worker: Worker, demand: Demand, tpot_s: float | None) -> bool:
        """The sequence did arrive at a worker whose handoff was given up; False where it was not given up there."""
        if self._left.pop(worker.process.incarnation, None) is None:
            return False
        self.decode = worker
        worker.decode.bind(self.key, demand, worker.keepable(tpot_s))
        return True

    def unbind(self) -> None:
        """The sequence does not go to the worker that it was bound to."""
        if self.decode is not None:
            self.decode.decode.release(self.key)
            self.holding.discard(self.decode)
            self.decode = None

    def computed(self, now: float) -> None:
        """Its prompt is no work any more. Idempotent."""
        self.prefill.prefill.release(self.key, now)

    def resident(self) -> None:
        """The sequence has arrived at the decode worker."""
        assert self.decode is not None, "resident where it was bound"
        self.decode.decode.resident(self.key)

    def arrived(self, first_token: float | None, now: float) -> None:
        """Resident, and where it was handed over, how long that took after its first token is learned of the worker."""
        self.resident()
        if self.decode is not None and self.handoffs.number == 1:  # a later one waited for room, too
            self.decode.handoffs.observe(0.0 if first_token is None else now - first_token)

    def release(self, now: float) -> None:
        """The attempt is over: it counts for no worker any more."""
        self.computed(now)
        if self.decode is not None:
            self.decode.decode.release(self.key)
