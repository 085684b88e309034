"""One attempt on a prefill worker.

    WAITING -> COMPUTING (chunks) -> DELIVERING -> RELEASED

| from | to | when |
|---|---|---|
| WAITING | COMPUTING | its blocks are reserved and the engine has it |
| COMPUTING | DELIVERING | the first token is drawn and a decode worker is to take over |
| COMPUTING | RELEASED | the first token ended it; or it failed, or was cancelled, and the engine has let go of it |
| DELIVERING | RELEASED | a decode worker has it; or it was cancelled, and no write reads its blocks any more |

`PrefillRole` moves it and frees its blocks, at RELEASED and nowhere else.
"""

from __future__ import annotations

import enum
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from baton.engine.api import Sequence
from baton.spec import AttemptKey, FinishReason, HandoffKey, SequenceSpec
from baton.v1 import worker_pb2 as wire
from baton.worker.runner import StepItem
from baton.worker.sending.outbound import Outbound
from baton.worker.sending.sender import Sender
from baton.worker.service import RouterSession
from kvtransfer.handoffs.delivery import Delivery
from kvtransfer.handoffs.messages import RefusalReason


class State(enum.Enum):
    """See the module."""

    WAITING = enum.auto()
    COMPUTING = enum.auto()
    DELIVERING = enum.auto()
    RELEASED = enum.auto()


@dataclass(slots=True)
class Attempt:
    """Times are monotonic seconds. `in_engine`: a step may touch the blocks. `over`: nothing more is done for it, and
    its blocks go as soon as nothing touches them; `acknowledge` that to the router then. `hold_until`: when a computed
    prompt that no decode worker takes is given up. `rank`, `work_s` and `late` are the queue's."""

    spec: SequenceSpec
    router: RouterSession
    received_at: float = field(default_factory=time.monotonic)
    state: State = State.WAITING
    blocks: list[int] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    cached_tokens: int = 0
    computed: int = 0
    started_at: float | None = None
    first_token_at: float | None = None
    first: StepItem | None = None
    in_engine: bool = False
    over: bool = False
    acknowledge: bool = False
    report_due: bool = False
    granted: bool = False
    outbound: Outbound | None = None
    sender: Sender | None = None
    hold_until: float | None = None
    rank: float = 0.0
    work_s: float = 0.0
    late: bool = False

    @property
    def key(self) -> AttemptKey:
        return self.spec.attempt

    def advance(self, computed: int) -> int:
        """So many of its tokens are computed now; returns how many of them are new."""
        before, self.computed = self.computed, max(computed, self.computed)
        return self.computed - before

    @property
    def uncomputed(self) -> int:
        """Prompt tokens still to compute."""
        return self.spec.known_tokens - max(self.computed, self.cached_tokens)

    def tokens_ahead(self, started: Iterable[Attempt]) -> int:
        """Prompt tokens that the engine has to compute first."""
        return sum(other.uncomputed for other in started if other.in_engine and other.rank <= self.rank)

    def sequence(self) -> Sequence:
        """What the engine gets."""
        return Sequence.from_spec(self.spec, self.blocks, self.cached_tokens, self.rank, self.late)

    @property
    def queue_ms(self) -> float:
        """From the command to the first chunk."""
        return ((self.started_at or time.monotonic()) - self.received_at) * 1e3

    @property
    def busy(self) -> bool:
        """A step or a write may still touch its blocks."""
        return self.in_engine or (self.outbound is not None and self.outbound.delivery.in_flight > 0)

    def hand_over(self, key: HandoffKey, block_tokens: int) -> Outbound:
        """Its first handoff, which knows what is computed so far."""
        deadline = None if self.spec.deadline_s is None else self.received_at + self.spec.deadline_s
        delivery = Delivery(key, self.blocks, self.spec.known_tokens, block_tokens)
        self.outbound = Outbound(self.spec, delivery, deadline)
        self.tell_progress(self.outbound)
        return self.outbound

    def tell_progress(self, outbound: Outbound) -> None:
        """Lets the handoff know what is computed, and the first token once it is drawn."""
        outbound.delivery.computed(self.computed)
        if self.first is not None:
            outbound.first_token, outbound.first_token_at = self.first.token_ids[0], self.first_token_at
            outbound.first_logprobs = self.first.logprobs[0] if self.first.logprobs else None
            outbound.delivery.first_token()

    def finished(self, reason: FinishReason) -> wire.Ended:
        """Its first token was its last."""
        ended = wire.Ended(attempt=self.key, output_tokens=len(self.spec.output) + 1)
        ended.reason = reason.value  # type: ignore[assignment]  # the same numbers
        return ended

    def report(self) -> wire.PrefillReport:
        """What it cost here."""
        done = self.first_token_at or time.monotonic()
        report = wire.PrefillReport(
            attempt=self.key,
            queue_ms=self.queue_ms,
            prefill_ms=(done - (self.started_at or done)) * 1e3,
            cached_tokens=self.cached_tokens,
        )
        if self.outbound is not None and self.granted:
            cost = self.outbound.cost
            report.transport = self.outbound.transport
            report.transfer_ms = cost.seconds * 1e3
            report.transfer_exposed_ms = max(0.0, (cost.last_written_at or 0.0) - done) * 1e3
            report.transfer_bytes = cost.bytes
            report.transfer_blocks = cost.blocks
            report.transfer_cached_blocks = cost.cached_blocks
        return report


def handoff_failed(
    key: HandoffKey, reason: RefusalReason, message: str, retry_after_s: float | None
) -> wire.HandoffFailed:
    """A handoff came to nothing."""
    return wire.HandoffFailed(
        attempt=key.attempt,
        handoff=key.handoff,
        reason=wire.RefusalReason.Value(f"REFUSAL_REASON_{reason.name}"),
        message=message,
        retry_after_ms=None if retry_after_s is None else retry_after_s * 1e3,
    )
