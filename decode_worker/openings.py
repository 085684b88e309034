"""Opens from the prefill workers: what gets room at once, what waits for it in the line, and what is refused.

A handoff that waits is alive by the lease of its writer, and until the request's deadline. It leaves the line by a
grant, a close, a cancel, a newer handoff of its attempt, or with its writer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from baton.model import KvLayout
from baton.rpc import awake
from baton.spec import AttemptKey, HandoffKey, RefusalReason, SequenceSpec
from baton.worker.session import RouterSession
from decode_worker.line import Parked
from decode_worker.running import Residents
from decode_worker.writer_streams import WriterStreams
from kvtransfer.blocks.admission import Need
from kvtransfer.handoffs.messages import Grant, Refusal, WaitNotice
from kvtransfer.handoffs.outcomes import GrantState
from kvtransfer.transports.base import Receiver


class Openings:
    """Runs on the event loop. It grants what the line of `residents` lets through."""

    def __init__(
        self,
        residents: Residents,
        writers: WriterStreams,
        layout: KvLayout,
        receivers: Mapping[str, Receiver],
        granted: Callable[[Parked, Grant], None],
    ) -> None:
        """`granted` hears of each grant before its writer does."""
        self._residents, self._writers, self._layout, self._receivers = residents, writers, layout, receivers
        self._granted = granted
        self._occupancy, self._line, self._counts = residents.occupancy, residents.line, residents.counts
        self._ledger, self._admission = residents.ledger, residents.admission
        self._line.admit = self._admit

    def open(
        self, key: HandoffKey, writer: str, spec: SequenceSpec, router: RouterSession | None, transport: str
    ) -> Grant | WaitNotice | Refusal:
        """See `DecodeHandoffs.open`."""
        parked = self._line.find(key.attempt)
        if parked is not None and parked.key == key and parked.writer == writer:
            return self._waiting(parked)
        need, now = Need.of(spec), awake.now()
        refusal = self._refusal(key, writer, need, router, transport)
        if refusal is not None or router is None:
            self._counts.add("handoffs_refused")
            return refusal or Refusal(key, RefusalReason.UNKNOWN_ROUTER, f"no stream to router {spec.router.name}")
        deadline = None if spec.deadline_s is None else now + spec.deadline_s
        digests, arrived_at = self._admission.digests(spec), time.monotonic() - spec.age_s
        parked = Parked(key, writer, spec, need, digests, router, transport, arrived_at, deadline)
        if self._ledger.grant(key) is not None:
            return self._ask_ledger(parked)  # a duplicate: it gets the same answer
        self._line.remove(key.attempt)  # an older handoff, which the writer has given up
        self._line.add(parked)
        self._ledger.writers.heard(writer, now)
        self._residents.start_waiting()
        if parked.answer is not None:
            return parked.answer
        parked.told = True
        self._counts.add("handoffs_waiting")
        return self._waiting(parked)

    def closed(self, key: HandoffKey) -> bool:
        """The writer gives a handoff up. False when it does not wait here."""
        parked = self._line.find(key.attempt)
        if parked is None or parked.key != key:
            return False
        self._line.remove(key.attempt)
        self._residents.start_waiting()
        return True

    def cancel(self, attempt: AttemptKey) -> bool:
        """False when no handoff of the attempt waits here."""
        parked = self._line.remove(attempt)
        if parked is None:
            return False
        self._refuse(parked, RefusalReason.CANCELLED, "the attempt was cancelled")
        self._residents.start_waiting()
        return True

    def writer_gone(self, writer: str) -> None:
        """It has ended, or has given all its handoffs up."""
        self._forget(lambda parked: parked.writer == writer)

    def expire(self, now: float) -> None:
        self._forget(lambda parked: not self._ledger.writers.is_live(parked.writer))
        for parked in self._line:
            if parked.deadline_at is not None and parked.deadline_at <= now:
                self._line.remove(parked.key.attempt)
                self._refuse(parked, RefusalReason.EXPIRED, "the request's deadline has passed")
                self._residents.start_waiting()

    def _refusal(
        self, key: HandoffKey, writer: str, need: Need, router: RouterSession | None, transport: str
    ) -> Refusal | None:
        if self._ledger.grant(key) is not None or router is None:
            return None
        if (verdict := self._ledger.attempts.verdict(key)) is not None:
            return verdict
        if (other := self._line.find(key.attempt)) is not None and other.key.handoff >= key.handoff:
            return Refusal(key, RefusalReason.EXPIRED, f"handoff {other.key.handoff} waits in its place")
        older = self._ledger.attempts.latest(key.attempt)
        if older is not None and self._ledger.state(older) is GrantState.RESIDENT:
            return Refusal(key, RefusalReason.EXPIRED, f"resident already, by handoff {older.handoff}")
        if self._ledger.writers.has_ended(writer):
            return Refusal(key, RefusalReason.EXPIRED, "the sender's process has ended")
        if obstacle := self._admission.obstacle(need.most):
            return Refusal(key, RefusalReason.TOO_LARGE, obstacle)
        if transport not in self._receivers:
            offered = ", ".join(self._receivers)
            return Refusal(key, RefusalReason.MISMATCH, f"transport differs: sender {transport}, receiver {offered}")
        return None

    def _admit(self, parked: Parked) -> bool:
        """Grants the first in the line its room; false where there is none yet."""
        if not self._occupancy.admits(parked.need, parked.digests):
            return False
        self._line.remove(parked.key.attempt)
        parked.answer = answer = self._ask_ledger(parked)
        if isinstance(answer, Grant):
            self._granted(parked, answer)
        if parked.told:
            self._writers.answered(parked.writer, answer)
        return True

    def _ask_ledger(self, parked: Parked) -> Grant | Refusal:
        first, known = self._layout.blocks_for(parked.need.first), self._layout.blocks_for(parked.need.known)
        now, deadline = awake.now(), parked.deadline_at
        answer = self._ledger.open(parked.key, parked.writer, parked.digests, known, first, now, deadline)
        if isinstance(answer, Refusal):
            self._counts.add("handoffs_refused")
        return answer

    def _waiting(self, parked: Parked) -> WaitNotice:
        ahead = self._line.ahead_of(parked)
        return WaitNotice(parked.key, ahead, self._residents.expected_s(ahead))

    def _forget(self, gone: Callable[[Parked], bool]) -> None:
        """Their writers expect no answer any more."""
        if left := [parked for parked in self._line if gone(parked)]:
            for parked in left:
                self._line.remove(parked.key.attempt)
            self._residents.start_waiting()

    def _refuse(self, parked: Parked, reason: RefusalReason, message: str) -> None:
        self._counts.add("handoffs_refused")
        self._writers.answered(parked.writer, Refusal(parked.key, reason, message))
