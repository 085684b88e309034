"""The prefill workers of the model: what `baton.worker.sending.sender` and `pair` do around the real `Delivery`."""

from __future__ import annotations

from baton.spec import HandoffKey, RefusalReason
from kvtransfer.handoffs.delivery import DeliveryState, GrantAnswer
from kvtransfer.handoffs.messages import Ticket
from tests.kvtransfer.model.state import OVER, Attempt, Message, State, Violation, Write


class PrefillSide(State):
    """Computes, writes, dies, loses its control stream and comes back."""

    def do_compute(self, number: int) -> None:
        delivery = self.attempts[number].delivery
        delivery.computed(delivery.complete_blocks + 1)
        if delivery.complete_blocks == len(delivery.source):
            delivery.first_token()

    def do_write(self, number: int) -> None:
        delivery = self.attempts[number].delivery
        ticket = delivery.ticket
        assert ticket is not None
        (move,) = delivery.take_moves(1)
        self.attempts[number].taken = move.index + 1
        if self.admitted.get(ticket.key) == ticket:
            self.claimed.add(ticket.key)
        elif not (self.case.closes_prove and ticket.key in self.claimed):  # a claim is asked for once
            delivery.write_failed(ticket.key, [move], "refused")
            return
        self.content[move.destination] = "half of a block"
        self.wires.writes.append(Write(ticket, move))

    def do_tear(self, index: int) -> None:
        """The writer gives a write up: its thread has ended (shm), or closed a socket that still carries bytes."""
        write = self.wires.writes[index]
        if self.case.closes_prove:
            del self.wires.writes[index]
        else:
            write.orphan = True
        self.of(write.ticket.key).delivery.write_failed(write.ticket.key, [write.move], "torn")

    def do_timeout(self, number: int) -> None:
        self.attempts[number].delivery.fail("out of time")

    def do_rebind(self, number: int) -> None:
        attempt = self.attempts[number]
        former = attempt.delivery.key
        key = HandoffKey(former.attempt, former.handoff + 1)
        attempt.delivery.rebind(key)
        if attempt.writer not in self.wires.down:
            self.say("open", key, attempt.writer)

    def do_crash(self, writer: int) -> None:
        """kill -9. What it has said is still under way; what is under way to it is lost."""
        self.alive.discard(writer)
        self.wires.down.discard(writer)
        self.wires.messages = [m for m in self.wires.messages if not self._to_writer(m, writer)]
        mine = [write for write in self.wires.writes if self.of(write.ticket.key).writer == writer]
        for write in mine:
            write.orphan = True
        if self.case.closes_prove:
            self.wires.writes = [write for write in self.wires.writes if write not in mine]
            self.wires.events.append(("writer_gone", writer))

    def do_break(self, writer: int) -> None:
        """The control stream ends, with all that was on it; every handoff on it fails."""
        gone = [m for m in self.wires.messages if self._about(m, writer)]
        self.wires.messages = [m for m in self.wires.messages if m not in gone]
        self.wires.down.add(writer)
        self.lose_closes([m[1] for m in gone if m[0] == "close" and isinstance(m[1], HandoffKey)])
        for attempt in self.attempts:
            if attempt.writer == writer:
                attempt.delivery.fail("the control stream ended")

    def has_business(self, writer: int) -> bool:
        """Whether the writer comes back after a break."""
        owed = any(self.of(key).writer == writer for key in self.wires.lost)
        return owed or any(a.writer == writer and a.delivery.state not in OVER for a in self.attempts)

    def do_reconnect(self, writer: int) -> None:
        self.wires.down.discard(writer)
        for key in [key for key, owner in self.pending.items() if owner == writer]:
            if not self.ledger.abort(key, RefusalReason.UNREACHABLE, self.now) and self.ledger.grant(key) is not None:
                self.say("abort", key)
        owed = [key for key in self.wires.lost if self.of(key).writer == writer]
        self.wires.lost = [key for key in self.wires.lost if key not in owed]
        for key in owed:
            self.say("close", key)
        for attempt in self.attempts:
            if attempt.writer == writer and attempt.delivery.state is DeliveryState.AWAITING_GRANT:
                self.say("open", attempt.delivery.key, writer)

    def do_cancel(self, number: int) -> None:
        """The router's word goes to both sides."""
        self.attempts[number].cancelled = True
        key = self.attempts[number].delivery.key
        self.wires.messages += [("cancel_here", key), ("cancel_there", key)]

    def on_cancel_here(self, key: HandoffKey) -> None:
        if self.of(key).writer in self.alive:
            self.of(key).delivery.fail("cancelled")

    def on_grant(self, key: HandoffKey, ticket: Ticket) -> None:
        attempt = self.of(key)
        if attempt.delivery.state in OVER:
            self._not_here(attempt, key)
        else:
            answer = attempt.delivery.granted(ticket)
            if answer is GrantAnswer.INVALID:
                raise Violation(f"{key}: an invalid grant")
            if answer is GrantAnswer.ACCEPTED:
                attempt.taken = ticket.cached_blocks

    def on_refused(self, key: HandoffKey) -> None:
        delivery = self.of(key).delivery
        if delivery.state not in OVER and key == delivery.key and not delivery.refused(key, "refused"):
            delivery.fail("refused")

    def on_abort_notice(self, key: HandoffKey) -> None:
        attempt = self.of(key)
        if attempt.delivery.state in OVER:
            self._not_here(attempt, key)
        else:
            attempt.delivery.aborted(key, "given up")

    def on_committed(self, key: HandoffKey) -> None:
        delivery = self.of(key).delivery
        if delivery.state not in OVER:
            delivery.committed(key)

    def _not_here(self, attempt: Attempt, key: HandoffKey) -> None:
        if not any(write.ticket.key == key and not write.orphan for write in self.wires.writes):
            self.send_close(attempt.writer, key)

    def _about(self, message: Message, writer: int) -> bool:
        """Whether it travels on this writer's control stream; cancels come from the router."""
        key = message[1]
        assert isinstance(key, HandoffKey)
        return not str(message[0]).startswith("cancel") and self.of(key).writer == writer

    def _to_writer(self, message: Message, writer: int) -> bool:
        return self._about(message, writer) and message[0] in ("grant", "refused", "abort", "committed")
