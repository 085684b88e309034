"""One prompt on a prefill worker.

    WAITING --started--> COMPUTING --first token--> HELD --handed over, ended--> DRAINING --no write--> RELEASED
       |                     |                                                       ^
       |                     +--ended--> STOPPING --the engine has let go------------|
       +--ended----------------------------------------------------------------------+

| state     | what it means                                                                          |
|-----------|----------------------------------------------------------------------------------------|
| WAITING   | it is in the queue and has no blocks                                                   |
| COMPUTING | it has blocks, and the engine computes its chunks; finished ones may already be moving |
| HELD      | the engine is done with it; its blocks wait for a decode worker, or are moving         |
| STOPPING  | it is over, and a step may still touch its blocks                                      |
| DRAINING  | it is over, and a write may still read its blocks                                      |
| RELEASED  | its blocks are freed                                                                   |

`Prompts` makes every transition, and frees the blocks at RELEASED and nowhere else.
"""

from __future__ import annotations

import enum
import time
from dataclasses import dataclass, field

from baton.engine.api import Sequence
from baton.messages import Event, PrefillReport, Transfer
from baton.spec import HandoffKey
from baton.worker.admission_queue import WaitingPrompt
from baton.worker.runner import StepItem
from baton.worker.sending.outbound import Outbound
from baton.worker.sending.sender import Sender
from kvtransfer.handoffs.delivery import Delivery, DeliveryState


class PromptState(enum.Enum):
    WAITING = enum.auto()
    COMPUTING = enum.auto()
    HELD = enum.auto()
    STOPPING = enum.auto()
    DRAINING = enum.auto()
    RELEASED = enum.auto()


@dataclass(slots=True)
class Prompt(WaitingPrompt):
    """Times are monotonic seconds. `hold_until`: when, by `baton.rpc.awake`, a prompt that nobody takes is given up.
    The router gets `farewell` at RELEASED."""

    state: PromptState = PromptState.WAITING
    blocks: list[int] = field(default_factory=list)
    cached_tokens: int = 0
    computed: int = 0
    started_at: float | None = None
    first_token_at: float | None = None
    first: StepItem | None = None
    outbound: Outbound | None = None
    sender: Sender | None = None
    hold_until: float | None = None
    farewell: list[Event] = field(default_factory=list)

    @property
    def over(self) -> bool:
        return self.state in (PromptState.STOPPING, PromptState.DRAINING, PromptState.RELEASED)

    @property
    def in_engine(self) -> bool:
        """Whether a step may touch its blocks."""
        return self.state in (PromptState.COMPUTING, PromptState.STOPPING)

    @property
    def writing(self) -> bool:
        """Whether a write may read its blocks."""
        return self.outbound is not None and self.outbound.delivery.in_flight > 0

    @property
    def granted(self) -> bool:
        """Whether a decode worker has reserved room, or has the sequence already."""
        return self.outbound is not None and self.outbound.delivery.ticket is not None

    @property
    def parked(self) -> bool:
        """Whether it stands in a decode worker's line for room."""
        return self.outbound is not None and self.outbound.waiting

    @property
    def handed_over(self) -> bool:
        return self.outbound is not None and self.outbound.delivery.state is DeliveryState.RELEASED

    @property
    def uncomputed(self) -> int:
        return self.spec.known_tokens - max(self.computed, self.cached_tokens)

    @property
    def queue_ms(self) -> float:
        """From the command to the first chunk."""
        return ((self.started_at or time.monotonic()) - self.received_at) * 1e3

    def advance(self, computed: int) -> int:
        """Notes that `computed` of its tokens are computed; returns how many of them are new."""
        before, self.computed = self.computed, max(computed, self.computed)
        return self.computed - before

    def sequence(self) -> Sequence:
        return Sequence.from_spec(self.spec, self.blocks, self.cached_tokens, self.rank, self.late)

    def hand_over(self, key: HandoffKey, block_tokens: int) -> Outbound:
        """Begins its first handoff, which knows what is computed so far."""
        deadline = None if self.spec.deadline_s is None else self.received_at + self.spec.deadline_s
        delivery = Delivery(key, self.blocks, self.spec.known_tokens, block_tokens)
        self.outbound = Outbound(self.spec, delivery, self.received_at, deadline)
        self.tell_progress()
        return self.outbound

    def tell_progress(self) -> None:
        """Tells its handoff, if any, what is computed and the first token, and sends what that allows."""
        outbound = self.outbound
        if outbound is None:
            return
        outbound.delivery.computed(self.computed)
        if self.first is not None:
            outbound.first_token, outbound.first_token_at = self.first.token_ids[0], self.first_token_at
            outbound.first_logprobs = self.first.logprobs[0] if self.first.logprobs else None
            outbound.delivery.first_token()
        if self.sender is not None:
            self.sender.advance(outbound)

    def drop_handoff(self, reason: str) -> None:
        if self.sender is not None and self.outbound is not None:
            self.sender.drop(self.outbound, reason)

    def report(self) -> PrefillReport:
        done = self.first_token_at or time.monotonic()
        transfer = None
        if self.outbound is not None and self.granted:
            cost = self.outbound.cost
            transfer = Transfer(
                transport=self.outbound.transport,
                ms=cost.seconds * 1e3,
                exposed_ms=max(0.0, (cost.last_written_at or 0.0) - done) * 1e3,
                bytes=cost.bytes,
                blocks=cost.blocks,
                cached_blocks=cost.cached_blocks,
            )
        prefill_ms = (done - (self.started_at or done)) * 1e3
        return PrefillReport(self.key, self.queue_ms, prefill_ms, self.cached_tokens, transfer)
