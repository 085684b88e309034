"""All handoffs to one decode worker: opens, commits and closes them on the pair's control stream.

When the stream breaks, every handoff on it fails, and the router binds anew. The peer quarantines granted blocks until
it gets a close: such closes are owed, and go first on the next stream. A close may be lost with its stream, so it is
owed again when the stream breaks before the peer has answered a later renewal. A second close does no harm.
"""

from __future__ import annotations

from concurrent.futures import Executor
from functools import partial

import structlog

from baton import errors
from baton.rpc import awake
from baton.rpc.convert import (
    handoff_from_wire,
    refusal_from_wire,
    retry_after_from_wire,
    sane,
)
from baton.spec import AttemptKey, HandoffKey, ProcessRef, RefusalReason
from baton.telemetry import Counts
from baton.v1 import transfer_pb2 as wire
from baton.worker.sending.mover import Mover
from baton.worker.sending.outbound import Outbound, OutboundEvents
from baton.worker.sending.pair import PairStream
from kvtransfer.handoffs.delivery import DeliveryState, GrantAnswer
from kvtransfer.handoffs.messages import Ticket
from kvtransfer.transports.base import Channel, Writer

log = structlog.get_logger(__name__)


class Sender:
    """All handoffs to one incarnation of a decode worker. A `Closer`, `MoverEvents` and `PairEvents`."""

    def __init__(
        self,
        peer: ProcessRef,
        handshake: wire.HandshakeRequest,
        transports: dict[str, Writer],
        events: OutboundEvents,
        executor: Executor,
        deadline_s: float,
        counts: Counts,
    ) -> None:
        self.peer = peer
        self._events, self._deadline_s, self._counts = events, deadline_s, counts
        self._incarnation = handshake.process.incarnation
        self._outbound: dict[AttemptKey, Outbound] = {}
        self._owed: dict[HandoffKey, str] = {}
        self._said: dict[HandoffKey, tuple[int, str]] = {}  # closes that may be lost if the stream breaks
        self._stream = PairStream(peer, handshake, transports, self, executor)
        self._mover = Mover(self, executor, self._stream.may_write, deadline_s)

    @property
    def closed(self) -> bool:
        return self._stream.closed

    @property
    def transport(self) -> str:
        """The transport to this peer while it is connected; else empty."""
        return self._stream.transport if self._stream.up else ""

    @property
    def note(self) -> str:
        """Why a better transport could not be used, while it is connected; else empty."""
        return self._stream.note if self._stream.up else ""

    @property
    def handoffs(self) -> int:
        return len(self._outbound)

    @property
    def writes(self) -> int:
        return self._mover.under_way.total()

    def start(self, outbound: Outbound) -> None:
        """Asks for a grant for the current handoff, now or as soon as the stream is up."""
        outbound.bound_to(outbound.key, self)
        self._outbound[outbound.key.attempt] = outbound
        self._mover.add(outbound)
        self._bound_wait(outbound, "no grant")
        if self._stream.up:
            self._open(outbound)
        self._stream.want()

    def advance(self, outbound: Outbound) -> None:
        """Sends and writes what a change (a chunk, the first token, an answer) has made possible."""
        if not self._stream.up:
            return  # `stream_down` is about to fail the handoff
        delivery = outbound.delivery
        ticket, blocks = delivery.ticket, delivery.take_commit()
        if blocks is not None and ticket is not None and outbound.first_token is not None:
            self._stream.send(commit=outbound.commit_request(ticket, blocks, outbound.first_token))
        if delivery.state is DeliveryState.COMMITTING and not delivery.in_flight and not outbound.timer:
            self._bound_wait(outbound, "no answer to the commit")  # writes under way have a deadline of their own
        outbound.close_ended()
        self._mover.wake()

    def drop(self, outbound: Outbound, reason: str) -> None:
        """Ends the current handoff, without a call to `events`."""
        outbound.delivery.fail(reason)
        self._forget(outbound)

    def send_close(self, key: HandoffKey, reason: str) -> None:
        if self._stream.up:
            number = self._stream.send(close=wire.CloseNotice(attempt=key.attempt, handoff=key.handoff, reason=reason))
            self._said = {k: said for k, said in self._said.items() if said[0] > self._stream.heard}
            self._said[key] = number, reason
        elif not self.closed:
            self._owed[key] = reason
            self._stream.want()

    async def stop(self) -> None:
        await self._stream.stop()

    # -- `PairEvents` --------------------------------------------------------------------------------------------

    @property
    def has_business(self) -> bool:
        return bool(self._owed or self._outbound)

    def stream_up(self) -> None:
        if self._stream.note:
            self._counts.add("transport_fallbacks")
        owed, self._owed = self._owed, {}
        for key, reason in owed.items():
            self.send_close(key, reason)
        for outbound in self._outbound.values():
            self._open(outbound)

    def stream_down(self, reason: RefusalReason, message: str) -> None:
        self._owed |= {key: why for key, (number, why) in self._said.items() if number > self._stream.heard}
        self._said.clear()
        if self.closed:
            self._owed.clear()  # the peer is gone
        for outbound in list(self._outbound.values()):
            self._fail(outbound, reason, message)

    async def move(self, channel: Channel) -> None:
        await self._mover.run(channel)

    def take(self, frame: wire.ReceiverFrame) -> None:
        kind = frame.WhichOneof("body")
        if kind == "grant":
            self._granted(frame.grant)
        elif kind == "waiting":
            self._waits(handoff_from_wire(frame.waiting), frame.waiting)
        elif kind == "committed":
            self._committed(handoff_from_wire(frame.committed))
        elif kind == "refused":
            self._refused(handoff_from_wire(frame.refused), frame.refused)
        elif kind == "abort":
            self._aborted(handoff_from_wire(frame.abort), frame.abort)
        else:
            self._counts.add("frames_unknown")

    def _granted(self, message: wire.Grant) -> None:
        key = handoff_from_wire(message)
        outbound = self._known(key)
        if outbound is None:
            self._not_here(key)
            return
        writer, blocks = self._incarnation, tuple(message.blocks)
        try:
            ticket = Ticket(key, message.generation, message.write_token, blocks, message.cached_blocks, writer)
        except ValueError as error:
            self._fail(outbound, RefusalReason.MISMATCH, f"the grant is malformed: {error}")
            return
        answer = outbound.delivery.granted(ticket)
        if answer is GrantAnswer.INVALID:
            self._fail(outbound, RefusalReason.MISMATCH, outbound.delivery.reason)
            return
        if answer is GrantAnswer.ACCEPTED:
            outbound.set_timer(None)
            outbound.waiting = False
            outbound.cost.cached_blocks = ticket.cached_blocks
            self._events.granted(outbound)
        self.advance(outbound)

    def _waits(self, key: HandoffKey, message: wire.Waiting) -> None:
        """From now on the wait is bounded by the request's deadline and the pair's lease."""
        outbound = self._known(key)
        if outbound is None or key != outbound.key or outbound.delivery.state is not DeliveryState.AWAITING_GRANT:
            return
        outbound.waiting = True
        left_s = outbound.time_left_s
        late = f"no room at {self.peer.name} before the request's deadline"
        outbound.set_timer(None if left_s is None else self._timer(outbound, left_s, late))
        self._events.waits(outbound, message.ahead, sane(message.expected_ms))

    def _committed(self, key: HandoffKey) -> None:
        outbound = self._known(key)
        if outbound is not None and outbound.delivery.committed(key):
            self._forget(outbound)
            self._events.released(outbound)

    def _refused(self, key: HandoffKey, message: wire.Refused) -> None:
        outbound = self._known(key)
        if outbound is None or key != outbound.key:
            return
        delivery = outbound.delivery
        if delivery.refused(key, message.message) or delivery.fail(message.message):
            retry = retry_after_from_wire(message)
            self._fail(outbound, _reason(message.reason), message.message, retry)

    def _aborted(self, key: HandoffKey, message: wire.AbortNotice) -> None:
        outbound = self._known(key)
        if outbound is None:
            self._not_here(key)
        elif outbound.delivery.aborted(key, message.message):
            self._fail(outbound, _reason(message.reason), message.message)
        else:
            outbound.close_ended()

    def _known(self, key: HandoffKey) -> Outbound | None:
        outbound = self._outbound.get(key.attempt)
        if outbound is None:
            self._counts.add("late_messages")
        return outbound

    def _not_here(self, key: HandoffKey) -> None:
        """Answers about a handoff that is over here. While a write of it is under way, its end sends the close."""
        if not self._mover.under_way[key]:
            self.send_close(key, "not under way here any more")

    def _open(self, outbound: Outbound) -> None:
        outbound.transport = self._stream.transport
        self._stream.send(open=outbound.open_request())

    # -- `MoverEvents` -------------------------------------------------------------------------------------------

    def handed_out(self, outbound: Outbound) -> None:
        if self._outbound.get(outbound.key.attempt) is outbound:
            self.advance(outbound)

    def wrote(self, outbound: Outbound) -> None:
        if self._outbound.get(outbound.key.attempt) is outbound:
            self.advance(outbound)
        else:
            outbound.close_ended()  # the handoff is over here, or bound to another worker
        self._events.settled(outbound)

    def write_failed(self, outbound: Outbound, key: HandoffKey, error: errors.BatonError) -> None:
        live = self._outbound.get(key.attempt) is outbound and key == outbound.key
        # The refusal may overtake the abort that says why; and what is over here may be over there.
        if isinstance(error, errors.WriteRevoked) or (isinstance(error, errors.WriteRefused) and not live):
            self._counts.add("writes_revoked")
            log.debug("write revoked", handoff=str(key), peer=self.peer.name, error=str(error))
        else:
            self._counts.add("writes_failed")
            log.warning("write failed", handoff=str(key), peer=self.peer.name, error=str(error))
        if live:
            self._fail(outbound, RefusalReason.UNREACHABLE, str(error))
        outbound.close_ended()
        self._events.settled(outbound)

    # -- endings -------------------------------------------------------------------------------------------------

    def _bound_wait(self, outbound: Outbound, what: str) -> None:
        message = f"{what} from {self.peer.name} within {self._deadline_s:g} s"
        outbound.set_timer(self._timer(outbound, self._deadline_s, message))

    def _timer(self, outbound: Outbound, seconds: float, message: str) -> awake.Timer:
        return awake.Timer(seconds, partial(self._timed_out, outbound, outbound.key, message))

    def _timed_out(self, outbound: Outbound, key: HandoffKey, message: str) -> None:
        if outbound.key == key and outbound.delivery.fail(message):
            self._fail(outbound, RefusalReason.EXPIRED, message)

    def _fail(
        self, outbound: Outbound, reason: RefusalReason, message: str, retry_after_s: float | None = None
    ) -> None:
        """Tells the role of a failure now, the peer as soon as no write is under way."""
        outbound.delivery.fail(message)
        self._forget(outbound)
        self._events.failed(outbound, reason, message, retry_after_s)

    def _forget(self, outbound: Outbound) -> None:
        outbound.set_timer(None)
        outbound.waiting = False
        self._mover.remove(outbound)
        if self._outbound.get(outbound.key.attempt) is outbound:
            del self._outbound[outbound.key.attempt]
        outbound.close_ended()


def _reason(number: int) -> RefusalReason:
    return refusal_from_wire(number) or RefusalReason.UNREACHABLE  # UNSPECIFIED is 0
