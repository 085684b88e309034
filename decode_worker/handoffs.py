"""Sequences on their way to this worker: grants room, takes their blocks, and makes residents of them.

The ledger (`kvtransfer.handoffs.grants`) has the life cycle of a handoff; its clock is `baton.rpc.awake`. Each entry of
`pending` lasts until its sequence is resident, or until all of its granted blocks are proved safe.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import structlog

from baton.cost import HANDOFF_S, HandoffTimes
from baton.engine import api
from baton.messages import Freed, HandoffDone, TokenRun, Tokens
from baton.model import KvLayout
from baton.rpc import awake
from baton.spec import AttemptKey, HandoffKey, RefusalReason, SequenceSpec
from baton.worker.session import RouterSession
from decode_worker.line import Parked
from decode_worker.openings import Openings
from decode_worker.records import FirstToken, Pending, Resident
from decode_worker.running import Residents
from decode_worker.scheduler import DecodeScheduler
from decode_worker.writer_streams import WriterStreams
from kvtransfer.handoffs.messages import Aborted, Grant, Refusal, WaitNotice
from kvtransfer.handoffs.outcomes import GrantState, LedgerOutcome
from kvtransfer.transports.base import Receiver, ReceiverEvents
from kvtransfer.transports.wire import OVER

WAKE_EVERY_S = 0.05
"""Blocks that land wake a resting engine at most so often: less than the last chunk of a prompt takes, so that the
engine is awake when that arrives."""
MakeReceivers = Callable[[ReceiverEvents], Mapping[str, Receiver]]
log = structlog.get_logger(__name__)


class LoopEvents:
    """A `ReceiverEvents` that calls `target` on the event loop on which it was made."""

    def __init__(self, target: ReceiverEvents) -> None:
        self._loop, self._target = asyncio.get_running_loop(), target

    def landed(self, key: HandoffKey, generation: int, indices: Sequence[int]) -> None:
        self._post(self._target.landed, key, generation, tuple(indices))

    def revoked(self, key: HandoffKey) -> None:
        self._post(self._target.revoked, key)

    def writer_gone(self, incarnation: str) -> None:
        self._post(self._target.writer_gone, incarnation)

    def refused_write(self, key: HandoffKey, why: str) -> None:
        self._post(self._target.refused_write, key, why)

    def _post(self, action: Callable[..., None], *given: Any) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(action, *given)


class DecodeHandoffs:
    """Runs on the event loop. A `ReceiverEvents`, which the transports call through `LoopEvents`."""

    def __init__(
        self,
        residents: Residents,
        aborted: list[Aborted],
        scheduler: DecodeScheduler,
        writers: WriterStreams,
        layout: KvLayout,
        make_receivers: MakeReceivers,
    ) -> None:
        """The ledger, which `residents` use too, appends each grant that it gives up to `aborted`."""
        self._residents, self._ledger, self._pending = residents, residents.ledger, residents.occupancy.pending
        self._counts, self._scheduler = residents.counts, scheduler
        self._aborted, self._writers = aborted, writers
        self._awaiting_proof: dict[HandoffKey, RouterSession] = {}
        self._times = HandoffTimes()
        self._woken_at = -math.inf
        self.receivers = make_receivers(LoopEvents(self))
        self._openings = Openings(residents, writers, layout, self.receivers, self._granted)

    # From the Transfer service.

    def open(
        self, key: HandoffKey, writer: str, spec: SequenceSpec, router: RouterSession | None, transport: str
    ) -> Grant | WaitNotice | Refusal:
        """Reserves room for the sequence, or puts it in the line, or says why it can have none. A duplicate gets the
        same answer. `router` is the session of the spec's router, None without one."""
        answer = self._openings.open(key, writer, spec, router, transport)
        self._settle_aborted()  # an older handoff of the attempt
        return answer

    def commit(self, key: HandoffKey, generation: int, blocks: int, first: FirstToken) -> LedgerOutcome:
        """See `GrantLedger.commit`. A sequence that becomes resident answers the writer by itself."""
        return self._settled(key, self._ledger.commit(key, generation, blocks, first))

    def closed(self, key: HandoffKey) -> None:
        if self._openings.closed(key):
            return
        pending = self._pending.get(key)
        proof = pending is not None and not self.receivers[pending.transport].revoke_proves
        self._ledger.closed(key, awake.now(), proof)
        self._settle_aborted()
        self._check_freed(key)

    def renew(self, writer: str) -> None:
        self._ledger.writers.renew(writer, awake.now())

    def writer_back(self, writer: str) -> None:
        """The writer has a new control stream. It has failed all handoffs of the old one, and its closes may be lost:
        gives up its grants, and asks for the closes again."""
        now, message = awake.now(), "the control stream broke"
        self._openings.writer_gone(writer)
        for key in self._of_writer(writer):
            grant = self._ledger.grant(key)
            given_up = self._ledger.abort(key, RefusalReason.UNREACHABLE, now, message)
            self._settle_aborted()
            if not given_up and grant is not None:
                self._writers.aborted(Aborted(grant, RefusalReason.UNREACHABLE, message, proven=False))

    def is_aborting(self, key: HandoffKey) -> bool:
        """Whether the handoff was given up and its blocks wait for proof."""
        return self._ledger.state(key) is GrantState.ABORTING

    # From the transports.

    def landed(self, key: HandoffKey, generation: int, indices: Sequence[int]) -> None:
        outcome = self._settled(key, self._ledger.landed(key, generation, indices))
        if outcome is LedgerOutcome.PENDING and (grant := self._ledger.grant(key)) is not None:
            self._wake(grant)

    def revoked(self, key: HandoffKey) -> None:
        if self.is_aborting(key):
            self._ledger.proved(key)
            self._check_freed(key)

    def writer_gone(self, incarnation: str) -> None:
        self._ledger.writer_gone(incarnation, awake.now())
        self._openings.writer_gone(incarnation)
        self._settle_aborted()
        for key in self._of_writer(incarnation):
            self._check_freed(key)

    def refused_write(self, key: HandoffKey, why: str) -> None:
        over = self.is_aborting(key) or self._ledger.attempts.verdict(key) is not None
        if over and why in OVER:  # it was on its way when the handoff ended
            self._counts.add("writes_revoked")
            log.debug("write revoked", handoff=str(key), why=why)
            return
        self._counts.add("writes_refused")
        log.warning("write refused", handoff=str(key), why=why)

    # From the role.

    def cancel(self, attempt: AttemptKey) -> bool:
        """Gives the attempt's handoff up, and refuses any later one. False when none was on its way."""
        answer, waited = self._ledger.cancel(attempt, awake.now()), self._openings.cancel(attempt)
        self._settle_aborted()
        return answer.aborted or waited

    def tell_freed(self, router: RouterSession, attempt: AttemptKey) -> bool:
        """Sends Freed once no handoff of the attempt waits for proof. False when none waits now: nothing is sent."""
        waiting = [key for key in self._pending if key.attempt == attempt]
        for key in waiting:
            self._awaiting_proof[key] = router
            self._check_freed(key)
        return bool(waiting)

    def expire(self) -> None:
        now = awake.now()
        self._ledger.expire(now)
        self._settle_aborted()
        self._openings.expire(now)

    # Inside.

    def _granted(self, parked: Parked, grant: Grant) -> None:
        self._pending[grant.key] = Pending(
            parked.spec,
            parked.need,
            parked.router,
            parked.transport,
            parked.writer,
            parked.arrived_at,
            awake.clock().missed,
            parked.told,
        )
        self._expect()
        self.receivers[parked.transport].admit(grant.ticket)
        self._wake(grant)
        self._settle_aborted()  # an older handoff of the attempt

    def _settled(self, key: HandoffKey, outcome: LedgerOutcome) -> LedgerOutcome:
        if outcome is LedgerOutcome.RESIDENT:
            self._start(key)
        elif outcome is LedgerOutcome.CONFLICT:
            self._ledger.abort(key, RefusalReason.MISMATCH, awake.now(), "a message contradicts the grant")
            self._settle_aborted()
        return outcome

    def _start(self, key: HandoffKey) -> None:
        first, pending = self._ledger.payload(key), self._pending.pop(key)
        self._expect()
        assert isinstance(first, FirstToken), "a commit carries the first token"
        self.receivers[pending.transport].revoke(key)
        spec, known, now = pending.spec, pending.spec.known_tokens, time.monotonic()
        sequence = api.Sequence.from_spec(spec, list(self._ledger.table(key)), computed=known)
        sequence.tokens.append(first.token)
        # Time that it waited for room is not made up for at the cost of the sequences here.
        took_s = 0.0 if pending.waited else now - first.drawn_at
        if key.handoff == 1 and not pending.waited and awake.clock().missed == pending.missed:
            self._times.observe(took_s)
            self._scheduler.handoff_s = max(self._times.expected_s, HANDOFF_S)  # trips are not in what is observed
        sequence.first_token_at = now - max(took_s, HANDOFF_S)
        resident = Resident(
            key, spec, pending.need, pending.router, list(sequence.tokens), pending.arrived_at, now, known
        )
        self._residents.add(resident, sequence)
        self._writers.committed(pending.writer, key)
        pending.router.send(HandoffDone(key))
        # The first token once more: the prefill worker's own message may be lost.
        logprobs = (first.logprobs,) if first.logprobs else ()
        pending.router.send(Tokens([TokenRun(key.attempt, known, (first.token,), logprobs)]))
        self._residents.start_waiting()

    def _settle_aborted(self) -> None:
        """Stops the writer of each grant that the ledger gave up, and frees those that are proved safe already. The
        others keep blocks, and no slot."""
        if not self._aborted:
            return
        while self._aborted:
            aborted = self._aborted.pop(0)
            key = aborted.grant.key
            pending = self._pending.get(key)
            request = pending.spec.request_id if pending else ""
            reason = aborted.reason.name
            log.info("handoff given up", request=request, handoff=str(key), reason=reason, message=aborted.message)
            self._counts.add("handoffs_aborted")
            self._expect()
            if pending is not None:
                self.receivers[pending.transport].revoke(key)
                self._writers.aborted(aborted)
                if aborted.proven:
                    self._check_freed(key)
        self._residents.start_waiting()

    def _check_freed(self, key: HandoffKey) -> None:
        """Forgets an aborted handoff once the ledger holds none of its blocks."""
        if self._ledger.state(key) is not None:
            return
        self._pending.pop(key, None)
        self._expect()
        router = self._awaiting_proof.pop(key, None)
        if router is not None and not any(other.attempt == key.attempt for other in self._awaiting_proof):
            router.send(Freed(key.attempt))
        self._residents.start_waiting()

    def _of_writer(self, writer: str) -> list[HandoffKey]:
        return [key for key, pending in self._pending.items() if pending.writer == writer]

    def _expect(self) -> None:
        """Tells the scheduler which sequences are on their way. O(their number), which slots bound."""
        self._scheduler.expected = tuple(
            pending.expected
            for key, pending in self._pending.items()
            if pending.expected is not None and not self.is_aborting(key)
        )

    def _wake(self, grant: Grant) -> None:
        now = time.monotonic()
        if not len(self._residents) and now - self._woken_at >= WAKE_EVERY_S:
            self._woken_at = now
            self._residents.runner.wake(grant.table)
