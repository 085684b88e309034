"""One attempt on its way to a decode worker, and its cost."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import Protocol

from baton.rpc.awake import Timer
from baton.rpc.convert import logprobs_to_wire, spec_to_wire
from baton.spec import HandoffKey, RefusalReason, SequenceSpec, TokenLogprobs
from baton.v1 import transfer_pb2 as wire
from kvtransfer.handoffs.delivery import Delivery
from kvtransfer.handoffs.messages import Ticket

AGE_LIMIT_US = 3_600_000_000


@dataclass(slots=True)
class TransferCost:
    """`seconds` were spent in writes; the receiver had `cached_blocks` already; `last_written_at` is monotonic."""

    seconds: float = 0.0
    bytes: int = 0
    blocks: int = 0
    cached_blocks: int = 0
    last_written_at: float | None = None


class Closer(Protocol):
    def send_close(self, key: HandoffKey, reason: str) -> None:
        """Promises the decode worker that nothing more is written under this handoff, as soon as it is connected."""


@dataclass(slots=True)
class Outbound:
    """An attempt's handoffs, one after another; `delivery` has the state of the current one. `routes` has the way of
    each, because a close may be due long after the attempt was bound elsewhere. In monotonic seconds, `received_at` is
    when the spec came, `deadline_at` the request's deadline. `waiting`: the receiver has no room yet."""

    spec: SequenceSpec
    delivery: Delivery
    received_at: float
    deadline_at: float | None = None
    first_token: int | None = None
    first_token_at: float | None = None
    first_logprobs: TokenLogprobs | None = None
    transport: str = ""
    cost: TransferCost = field(default_factory=TransferCost)
    routes: dict[int, Closer] = field(default_factory=dict)
    timer: Timer | None = None
    waiting: bool = False

    @property
    def key(self) -> HandoffKey:
        return self.delivery.key

    @property
    def first_token_age_us(self) -> int:
        """0 before the first token; at most an hour."""
        at = self.first_token_at
        return 0 if at is None else min(int((time.monotonic() - at) * 1e6), AGE_LIMIT_US)

    @property
    def time_left_s(self) -> float | None:
        """Until the request's deadline; always positive."""
        return None if self.deadline_at is None else max(0.001, self.deadline_at - time.monotonic())

    def open_request(self) -> wire.OpenRequest:
        """With what counts from when it is sent brought up to date."""
        age_s = self.spec.age_s + time.monotonic() - self.received_at
        spec = replace(self.spec, deadline_s=self.time_left_s, ttft_left_s=None, age_s=age_s)
        return wire.OpenRequest(
            attempt=self.key.attempt, handoff=self.key.handoff, spec=spec_to_wire(spec), transport=self.transport
        )

    def commit_request(self, ticket: Ticket, blocks: int, first_token: int) -> wire.CommitRequest:
        logprobs = self.first_logprobs
        return wire.CommitRequest(
            attempt=self.key.attempt,
            handoff=self.key.handoff,
            generation=ticket.generation,
            blocks=blocks,
            first_token=first_token,
            first_logprobs=None if logprobs is None else logprobs_to_wire(logprobs),
            first_token_age_us=self.first_token_age_us,
        )

    def bound_to(self, key: HandoffKey, closer: Closer) -> None:
        self.routes[key.handoff] = closer
        self.cost = TransferCost()
        self.waiting = False

    def set_timer(self, timer: Timer | None) -> None:
        """Replaces the timer, so that at most one wait is bounded at a time."""
        if self.timer is not None:
            self.timer.cancel()
        self.timer = timer

    def wrote(self, size: int, blocks: int, seconds: float) -> None:
        self.cost.seconds += seconds
        self.cost.bytes += size
        self.cost.blocks += blocks
        self.cost.last_written_at = time.monotonic()

    def close_ended(self) -> None:
        """Sends the closes that are due: of handoffs that are over, without a write under way."""
        for key in self.delivery.take_closed():
            self.routes[key.handoff].send_close(key, self.delivery.reason or "closed")


class OutboundEvents(Protocol):
    """Reports to the role that holds the blocks, on the event loop."""

    def granted(self, outbound: Outbound) -> None: ...

    def waits(self, outbound: Outbound, ahead: int, expected_ms: float) -> None:
        """The decode worker has no room yet; `ahead` sequences go first."""

    def released(self, outbound: Outbound) -> None:
        """The sequence is resident at the decode worker; the source blocks may be freed."""

    def failed(
        self, outbound: Outbound, reason: RefusalReason, message: str, retry_after_s: float | None = None
    ) -> None:
        """This handoff is over; another may be bound while the blocks are held."""

    def settled(self, outbound: Outbound) -> None:
        """A write has returned; perhaps none is under way any more."""
