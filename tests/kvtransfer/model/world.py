"""A whole state of the model: what can happen in it, what must hold."""

from __future__ import annotations

from kvtransfer.handoffs.delivery import DeliveryState
from kvtransfer.handoffs.outcomes import GrantState
from tests.kvtransfer.model.decode_side import DecodeSide
from tests.kvtransfer.model.prefill_side import PrefillSide
from tests.kvtransfer.model.state import FAIR, OVER, Action, Attempt, Message, Violation


class World(PrefillSide, DecodeSide):
    """Mutants override its methods."""

    def actions(self) -> list[Action]:
        """Everything that is possible in this state."""
        found: list[Action] = []
        for message in dict.fromkeys(self.wires.messages):
            found.append(("deliver", message))
            if self.left["duplicate"]:
                found.append(("duplicate", message))
        found += [("event", event) for event in self.wires.events]
        found += [("revoke", key) for key in self.wires.revoking]
        found += [("reconnect", writer) for writer in self.wires.down & self.alive if self.has_business(writer)]
        for index, write in enumerate(self.wires.writes):
            found.append(("place", index))
            if write.orphan:
                found.append(("drain", index))
            elif self.left["tear"]:
                found.append(("tear", index))
        for number, attempt in enumerate(self.attempts):
            found += self._actions_of(number, attempt)
        found += self._actions_of_residents()
        for writer in self.alive:
            found += [(name, writer) for name in ("crash", "break") if self.left[name] and self._may(name, writer)]
            if self.now and self.left["renew"]:
                found.append(("renew", writer))
        if self.left["tick"]:
            found.append(("tick",))
        held = self.ledger.statistics()
        if held.writers + held.granted + held.receiving and not any(action[0] in FAIR for action in found):
            found.append(("pass",))
        return found

    def _may(self, name: str, writer: int) -> bool:
        return name == "crash" or writer not in self.wires.down

    def _actions_of(self, number: int, attempt: Attempt) -> list[Action]:
        found: list[Action] = []
        delivery, up = attempt.delivery, attempt.writer not in self.wires.down
        if attempt.writer not in self.alive:
            return found
        if delivery.complete_blocks < len(delivery.source):
            found.append(("compute", number))
        if up and delivery.ticket is not None and delivery.state is DeliveryState.DELIVERING and self._ready(attempt):
            found.append(("write", number))
        again = delivery.key.handoff < self.case.handoffs and not attempt.cancelled
        if delivery.state is DeliveryState.FAILED and again:
            found.append(("rebind", number))
        if delivery.state in (DeliveryState.AWAITING_GRANT, DeliveryState.COMMITTING) and self.left["timeout"]:
            found.append(("timeout", number))
        if not attempt.cancelled and self.left["cancel"]:
            found.append(("cancel", number))
        return found

    def _actions_of_residents(self) -> list[Action]:
        residents = self.residents()
        found: list[Action] = [("release", key) for key in residents if not self.wants(key)]
        found += [("grow", key) for key in residents if self.wants(key) and key not in self.stalled]
        if self.stalled and len(residents) > 1:
            found.append(("preempt", residents[-1]))  # never the oldest, so that one always ends
        if self.waiting and self.pool.available >= self.waiting[min(self.waiting)] and self.may_resume():
            found.append(("resume", min(self.waiting)))
        return found

    def may_resume(self) -> bool:
        return not self.stalled

    @staticmethod
    def _ready(attempt: Attempt) -> bool:
        return attempt.taken < attempt.delivery.complete_blocks

    def act(self, action: Action) -> None:
        """Does it, and what follows from it at once."""
        name = str(action[0])
        if name not in FAIR:
            self.left[name] -= 1
        getattr(self, f"do_{name}")(*action[1:])
        for attempt in self.attempts:
            if attempt.writer in self.alive:
                self._advance(attempt)
        self.grow_stalled()
        self.pool.sort()

    def _advance(self, attempt: Attempt) -> None:
        delivery, up = attempt.delivery, attempt.writer not in self.wires.down
        ticket = delivery.ticket
        if up and ticket is not None and (blocks := delivery.take_commit()) is not None:
            self.say("commit", delivery.key, ticket.generation, blocks)
        for key in delivery.take_closed():
            self.send_close(attempt.writer, key)

    def do_deliver(self, message: Message) -> None:
        self.wires.messages.remove(message)
        self.do_duplicate(message)

    def do_duplicate(self, message: Message) -> None:
        name = "abort_notice" if message[0] == "abort" else message[0]
        getattr(self, f"on_{name}")(*message[1:])

    def do_event(self, event: Message) -> None:
        self.wires.events.remove(event)
        getattr(self, f"on_{event[0]}")(*event[1:])

    def check(self) -> None:
        """No block is reused while it may be written, and the books balance."""
        self.ledger.check_integrity()
        for write in self.wires.writes:
            key, block = write.ticket.key, write.move.destination
            grant, state = self.ledger.grant(key), self.ledger.state(key)
            if grant is None or grant.ticket != write.ticket:
                raise Violation(f"{key} may still write block {block}, which is granted to it no more")
            if state is GrantState.RESIDENT:
                raise Violation(f"{key} is resident, and block {block} may still be written")
            safe = self.pool.quarantined(block) if state is GrantState.ABORTING else self.pool.holds(block) == 1
            if not safe:
                raise Violation(f"{key} may still write block {block}, which another sequence has")

    def ended(self) -> bool:
        """Every transfer is over, and nothing is left of it."""
        wires = self.wires
        quiet = not (wires.messages or wires.events or wires.writes or wires.revoking)
        over = all(a.writer not in self.alive or a.delivery.state in OVER for a in self.attempts)
        idle = all(a.writer not in self.alive or not a.delivery.in_flight for a in self.attempts)
        empty = not self.ledger_keys() and not self.waiting and self.pool.available == self.pool.blocks
        return quiet and over and idle and empty
