"""Binds prompts to decode workers, and follows each handoff to its end."""

from __future__ import annotations

import structlog

from baton.messages import HandoffFailed, HandoffWaiting
from baton.rpc import awake
from baton.spec import HandoffKey, ProcessRef, RefusalReason
from baton.telemetry import Counts
from baton.v1 import transfer_pb2 as wire
from baton.worker.sending.outbound import Outbound
from baton.worker.sending.senders import Senders
from baton.worker.session import RouterSession
from kvtransfer.transports.base import Writer
from prefill_worker.prompt import PromptState
from prefill_worker.running import HOLD_S, Prompts

log = structlog.get_logger(__name__)


class PrefillHandoffs:
    """An `OutboundEvents`."""

    def __init__(
        self,
        prompts: Prompts,
        handshake: wire.HandshakeRequest,
        writers: dict[str, Writer],
        deadline_s: float,
        block_tokens: int,
        counts: Counts,
    ) -> None:
        """`deadline_s` bounds each wait of a handoff."""
        self._prompts, self._block_tokens, self._counts = prompts, block_tokens, counts
        self.senders = Senders(handshake, writers, self, deadline_s, counts)

    def bind(self, router: RouterSession, key: HandoffKey, decode: ProcessRef) -> None:
        prompt = self._prompts.find(key.attempt)
        if prompt is None:
            self._counts.add("late_messages")
            gone = "the prompt is not held here any more"
            router.send(HandoffFailed(key, RefusalReason.EXPIRED, gone))
            return
        if prompt.over or prompt.state is PromptState.WAITING:
            self._counts.add("late_messages")  # or early: a router binds after `Started` only
            return
        outbound = prompt.outbound
        if outbound is None:
            outbound = prompt.hand_over(key, self._block_tokens)
        elif key.handoff <= outbound.key.handoff:
            self._counts.add("duplicate_messages")
            return
        else:
            prompt.drop_handoff("bound anew")
            if not outbound.delivery.rebind(key):
                return
        prompt.hold_until = None
        prompt.sender = self.senders.to(decode)
        prompt.sender.start(outbound)

    def granted(self, outbound: Outbound) -> None:
        self._prompts.start_waiting()

    def waits(self, outbound: Outbound, ahead: int, expected_ms: float) -> None:
        prompt = self._prompts.find(outbound.key.attempt)
        if prompt is None or prompt.over:
            return
        self._counts.add("handoffs_waiting")
        prompt.router.send(HandoffWaiting(outbound.key, ahead, expected_ms))
        self._prompts.start_waiting()

    def released(self, outbound: Outbound) -> None:
        if (prompt := self._prompts.find(outbound.key.attempt)) is not None:
            self._prompts.end(prompt)

    def failed(
        self, outbound: Outbound, reason: RefusalReason, message: str, retry_after_s: float | None = None
    ) -> None:
        prompt = self._prompts.find(outbound.key.attempt)
        if prompt is None or prompt.over:
            return
        self._counts.add("handoffs_failed")
        about = {"request": outbound.spec.request_id, "handoff": str(outbound.key)}
        log.info("handoff failed", **about, reason=reason.name, message=message)
        prompt.hold_until = awake.now() + HOLD_S
        prompt.router.send(HandoffFailed(outbound.key, reason, message, retry_after_s))

    def settled(self, outbound: Outbound) -> None:
        if (prompt := self._prompts.find(outbound.key.attempt)) is not None:
            self._prompts.release_if_idle(prompt)
