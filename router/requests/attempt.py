"""One attempt at a request: its workers, its handoffs, and its entries in the workers' ledgers.

    QUEUED --Started--> PREFILLING --first token--> HANDING_OFF --handed over--> DECODING
       |                    |  \\--first token, computed in place----------------> |
       +--------------------+---------------------------+-------------------------+--> OVER

| state       | holds                                       | ends with                                              |
|-------------|---------------------------------------------|--------------------------------------------------------|
| QUEUED      | a place in the prefill worker's queue       | Started                                                |
| PREFILLING  | blocks there; after a bind perhaps a grant  | the first token                                        |
| HANDING_OFF | blocks on both sides                        | the decode worker's HandoffDone, or its first token    |
| DECODING    | blocks on the decode worker                 | Ended                                                  |

The workers own the blocks. A cancel must reach the workers that may hold some: `holding`.

The first token never waits for a handoff. Where a decode worker has no room the handoff waits in its line, until that
worker has some or another one. After a failure the attempt is bound elsewhere, or again after a pause. A worker that
can't take the sequence at all is not asked twice. Nor is one that may hold blocks and was left for another: the attempt
is cancelled there, which leaves a tombstone.
"""

from __future__ import annotations

from enum import Enum, auto

from baton.errors import BatonError
from baton.identity import mint_attempt
from baton.messages import BindCommand, DirectCommand, HandoffFailed, PrefillCommand, PrefillReport
from baton.spec import AttemptKey, HandoffKey
from baton.telemetry import Counts
from router.placement.offers import Way
from router.placement.policy import Plan
from router.requests.admitted import Admitted
from router.requests.commands import Commands, late
from router.requests.failures import FINAL, UNCERTAIN, CopyLost, note, pause_s, refusal
from router.requests.placer import Placer
from router.workers.worker import Worker


class AttemptState(Enum):
    QUEUED = auto()
    PREFILLING = auto()
    HANDING_OFF = auto()
    DECODING = auto()
    OVER = auto()


class Attempt:
    """Lives on the event loop; never waits. A worker that has restarted is another: it has refused nothing."""

    def __init__(
        self,
        admitted: Admitted,
        prefill: Worker,
        plan: Plan,
        placer: Placer,
        commands: Commands,
        counts: Counts,
        key: AttemptKey | None = None,
    ) -> None:
        """`prefill` is the worker that `plan` chose; it decodes too where the plan is direct."""
        self.key, self.plan = key or mint_attempt(), plan
        self.state = AttemptState.QUEUED
        self.prefill = prefill
        self.decode: Worker | None = None
        self.holding = {prefill}
        self.handoffs = 0
        self.report: PrefillReport | None = None
        """Once it is set, the prefill worker has freed its blocks, unless it decodes too."""
        self._admitted, self._placer, self._commands, self._counts = admitted, placer, commands, counts
        self._clock = placer.clock
        self._missed = placer.missed()
        self._excluded: set[str] = set()
        self._uncertain: Worker | None = None
        self._failures = 0
        self._waited = False
        self._last_failure: HandoffFailed | None = None

    @property
    def direct(self) -> bool:
        """Computed and decoded on one worker."""
        return self.plan.way is Way.DIRECT

    @property
    def hands_over(self) -> bool:
        """Whether it will need a decode worker."""
        return not self.direct and self._admitted.tokens_left > 1

    @property
    def undisturbed(self) -> bool:
        """Whether this process was awake all the time, so that the attempt's times tell something."""
        return self._placer.missed() == self._missed

    def start(self) -> None:
        """Sends the prompt to its worker."""
        admitted = self._admitted
        self.prefill.prefill.place(self.key, len(admitted.known), self.plan.queued)
        if self.direct:
            self._take_place_at(self.prefill)
        elif self.hands_over:
            self._placer.placed(admitted.model, self.key, len(admitted.known))
        self._counts.add("path_direct" if self.direct else "path_disaggregated")
        sequence = admitted.sequence(self.key, self._clock())
        self._commands.send(self.prefill, DirectCommand(sequence) if self.direct else PrefillCommand(sequence))

    def started(self, worker: Worker) -> bool:
        """The worker begins to compute the prompt. False where that is not news."""
        if worker is not self.prefill or self.state is not AttemptState.QUEUED:
            return False
        self.state = AttemptState.PREFILLING
        worker.prefill.started(self.key, self._clock())
        if self.direct:
            worker.decode.resident(self.key)
        return True

    def computed(self, *, last: bool) -> None:
        """The first token has come; `last`: it ends the sequence."""
        self.prefill.prefill.release(self.key, self._clock())
        if self.state is AttemptState.PREFILLING:
            if self.direct:
                self._decoding()
            elif not last:
                self.state = AttemptState.HANDING_OFF

    def bind(self) -> None:
        """The next handoff goes to the best decode worker. Raises the error that ends the attempt when none is left."""
        self._bind_to(self._choose()[0])

    def handoff_failed(self, worker: Worker, failure: HandoffFailed) -> float | None:
        """A handoff failed. Returns the seconds to wait before the next `bind`; None where none is due. Raises the
        error that ends the attempt."""
        decode, current = self.decode, worker is self.prefill and failure.key.handoff == self.handoffs
        if current and self.state is AttemptState.DECODING:  # only the report of that was lost
            self._commands.cancel([worker], self.key, "the handoff succeeded")
            return None
        if not current or decode is None:
            late(self._counts, "handoff_failed")
            return None
        note(failure, self._admitted.spec.request_id, decode.name, self._counts)
        self._give_place_back()
        if failure.reason in UNCERTAIN:
            self._uncertain = decode
            self.holding.add(decode)
        if failure.reason in FINAL:
            self._excluded.add(decode.process.incarnation)
        self._failures += 1
        self._last_failure = failure
        if self.report is not None:
            raise refusal(failure)  # the prefill worker has freed the blocks
        best, has_room = self._choose(decode.name)
        if has_room and best is not decode:
            self._bind_to(best)
            return None
        return pause_s(self._failures, failure.retry_after_s)

    def waits(self, worker: Worker, handoff: int) -> bool:
        """The decode worker has no room yet. False where that is not news."""
        current = worker is self.prefill and handoff == self.handoffs and self.decode is not None
        if not current or self.state not in (AttemptState.PREFILLING, AttemptState.HANDING_OFF):
            return False
        if not self._waited:
            self._counts.add("handoffs_waiting")
        self._waited = True
        return True

    def look_elsewhere(self) -> None:
        """Leaves the line of the decode worker for another one that has room. Raises as `bind`."""
        if (waited_for := self.decode) is None or self.state is AttemptState.DECODING:
            return
        if len(self._admitted.model.usable("decode")) < 2:
            return
        best, has_room = self._choose(waited_for.name)
        if has_room and best is not waited_for and self.rebound(waited_for):
            self._counts.add("handoffs_moved")

    def handed_over(self, worker: Worker, handoff: int, first_token: float | None) -> bool:
        """The decode worker owns the sequence; False where that is not news. The time of a handoff is learned from when
        the `first_token` came."""
        if handoff > self.handoffs:
            return False
        if self.decode is None and worker is self._uncertain:
            self._uncertain = None
            self._take_place_at(worker)
            self._counts.add("handoffs_readopted")  # a report of failure overtook that of success
        elif worker is not self.decode:
            return False
        self.decodes(first_token)
        return True

    def decodes(self, first_token: float | None) -> None:
        """The decode worker's messages show that it has the sequence. Idempotent."""
        if self.state not in (AttemptState.PREFILLING, AttemptState.HANDING_OFF):
            return
        now = self._clock()
        self.prefill.prefill.release(self.key, now)  # also where the first token comes later
        self._decoding()
        if self.decode is not None and self.handoffs == 1 and self.undisturbed and not self._waited:
            self.decode.handoffs.observe(0.0 if first_token is None else now - first_token)

    def ended(self, worker: Worker) -> bool:
        """The sequence is over on the worker; False where that is not the worker that has it."""
        decoding = self.state is AttemptState.DECODING
        if (worker is self.decode and (decoding or not self.direct)) or (worker is self.prefill and not decoding):
            self.holding.discard(worker)
            return True
        return False

    def preempted(self, worker: Worker) -> bool:
        """The worker that has the sequence needed its room; false where that is not news."""
        decodes = worker is self.decode and (self.direct or self.state is not AttemptState.PREFILLING)
        if not decodes or self.state in (AttemptState.QUEUED, AttemptState.OVER):
            return False
        self.holding.discard(worker)
        return True

    def may_be_at(self, worker: Worker) -> bool:
        """Whether the worker has some of the attempt, or may have: it has not confirmed a cancel."""
        return worker in self.holding or worker in self._commands.cancelling.get(self.key, ())

    def needs(self, worker: Worker) -> bool:
        """Whether it can't go on while the worker does not."""
        return worker is self.decode or (worker is self.prefill and self.state is not AttemptState.DECODING)

    def rebound(self, worker: Worker) -> bool:
        """Binds another decode worker in place of one that has not got the sequence yet; False where it may have it, or
        is not that. Raises as `bind`."""
        over = self.state in (AttemptState.DECODING, AttemptState.OVER)
        if worker is not self.decode or self.direct or over or self.report is not None:
            return False
        self._give_place_back()
        self._uncertain = worker  # it may have a grant: it gets a cancel
        self.holding.add(worker)
        self._bind_to(self._choose(worker.name)[0])
        return True

    def lost(self, worker: Worker, reason: str) -> None:
        """A worker is lost with its blocks. Raises CopyLost if the only copy was there."""
        self.holding.discard(worker)
        decoding = self.state is AttemptState.DECODING
        if worker is self.prefill and not decoding:
            kind = "decode" if self.direct else "prefill"
            raise CopyLost(f"{kind} worker {worker} is lost: {reason}", 1.0, f"{kind}_workers")
        if worker is not self.decode:
            return
        if decoding or self.report is not None:
            raise CopyLost(f"decode worker {worker} is lost: {reason}", 1.0, "decode_workers")
        self._give_place_back()
        self._counts.add("handoffs_failed_lost")
        try:
            self.bind()
        except BatonError:  # those that are left may not take this attempt any more, but perhaps another one
            raise CopyLost(f"decode worker {worker} is lost: {reason}", 1.0, "decode_workers") from None

    def cancel(self, reason: str) -> None:
        """Makes the workers that hold blocks forget the attempt."""
        self._commands.cancel(self.holding, self.key, reason)

    def close(self) -> None:
        """Takes the attempt out of all ledgers."""
        self.prefill.prefill.release(self.key, self._clock())
        if self.decode is not None:
            self.decode.decode.release(self.key)
        self._placer.settled(self.key)
        self.state = AttemptState.OVER

    def _choose(self, avoid: str = "") -> tuple[Worker, bool]:
        choice = self._placer.choose_decode(self._admitted, self._excluded, avoid)
        if choice is None:
            raise refusal(self._last_failure)
        return choice

    def _bind_to(self, worker: Worker) -> None:
        self._give_place_back()
        self._take_place_at(worker)
        self.handoffs += 1
        if self._uncertain is not None and self._uncertain is not worker:
            left, self._uncertain = self._uncertain, None
            self._excluded.add(left.process.incarnation)
            self.holding.discard(left)
            self._commands.cancel([left], self.key, "bound elsewhere")
        self._counts.add("handoffs")
        self._placer.settled(self.key)
        self._commands.send(self.prefill, BindCommand(HandoffKey(self.key, self.handoffs), worker.process))

    def _decoding(self) -> None:
        assert self.decode is not None, "bound before"
        self.state = AttemptState.DECODING
        self.decode.decode.resident(self.key)

    def _take_place_at(self, worker: Worker) -> None:
        self.decode = worker
        self.holding.add(worker)
        worker.decode.bind(self.key, self._admitted.demand, worker.keepable(self._admitted.tpot_s))

    def _give_place_back(self) -> None:
        if self.decode is not None:
            self.decode.decode.release(self.key)
            self.holding.discard(self.decode)
            self.decode = None
