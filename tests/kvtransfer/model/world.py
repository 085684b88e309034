"""A pair of workers and all that is between them, small enough to be explored in full.

The state machines are the real ones: `Delivery`, `GrantLedger` with its leases, writers and memory of attempts,
`BlockPool`. What carries their messages is modelled: a control stream that loses, repeats and reorders, a transport
that may still place bytes after everybody has given up, a router that binds again and cancels. The glue follows
`prefill_worker.sender` and `decode_worker.service`.

An action is a tuple, its name first. Those of `FAIR` happen sooner or later once they are possible; the others are the
adversary's, who has a budget of each.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from baton.spec import HandoffKey
from kvtransfer.delivery import Delivery, DeliveryState, GrantAnswer
from kvtransfer.grants import GrantLedger
from kvtransfer.handoff import Aborted, Grant, Refusal, RefusalReason, Ticket
from kvtransfer.outcomes import GrantState, LedgerLimits, Outcome
from kvtransfer.pool import BlockPool
from kvtransfer.transports.base import BlockMove

LEASE_S, TICK_S, HANDOFF_S, FOR_EVER = 5.0, 3.0, 8.0, 1e9
OVER = (DeliveryState.FAILED, DeliveryState.RELEASED)
FAIR = frozenset(
    {"deliver", "write", "place", "drain", "event", "revoke", "compute", "release", "rebind", "reconnect", "pass"}
)
Action = tuple[object, ...]
Message = tuple[object, ...]


@dataclass(frozen=True, slots=True)
class Case:
    """What is explored. `attempts`: (writer, prompt blocks, reserved growth, family); blocks of one family have the
    same content. `budget`: how often the adversary may do each thing."""

    attempts: tuple[tuple[int, int, int, int], ...]
    blocks: int
    closes_prove: bool
    """The writer's word is the proof (shm); else the transport's revocation is (tcp)."""
    budget: dict[str, int]
    handoffs: int = 2
    computed: bool = True
    """The prompts are computed from the start."""


@dataclass(slots=True)
class Write:
    """One block on its way. `orphan`: its writer has given it up or is dead, but bytes may still arrive."""

    ticket: Ticket
    move: BlockMove
    orphan: bool = False


@dataclass(slots=True)
class Attempt:
    """On its prefill worker."""

    writer: int
    family: int
    delivery: Delivery
    growth: int
    cancelled: bool = False


def no_token() -> bytes:
    return bytes(16)


class Violation(AssertionError):
    """A property does not hold."""


@dataclass(slots=True)
class Channels:
    """What is under way. `lost`: closes that went down with a control stream; `down`: streams to be opened again."""

    messages: list[Message] = field(default_factory=list)
    events: list[Message] = field(default_factory=list)
    writes: list[Write] = field(default_factory=list)
    revoking: list[HandoffKey] = field(default_factory=list)
    lost: list[HandoffKey] = field(default_factory=list)
    down: set[int] = field(default_factory=set)


class World:
    """One state. `ledger_type` and the methods are there to be broken by mutants."""

    ledger_type = GrantLedger

    def __init__(self, case: Case) -> None:
        self.case = case
        self.now = 0.0
        self.left = Counter(case.budget)
        self.pool = BlockPool(case.blocks)
        limits = LedgerLimits(lease_s=LEASE_S, handoff_s=HANDOFF_S, tombstone_s=FOR_EVER)
        self.ledger = self.ledger_type(self.pool, limits, self.on_abort, no_token)
        self.admitted: dict[HandoffKey, Ticket] = {}
        self.pending: dict[HandoffKey, int] = {}
        self.wires = Channels()
        self.alive: set[int] = {writer for writer, *_ in case.attempts}
        self.claimed: set[HandoffKey] = set()
        self.content: list[object] = [None] * case.blocks
        self.attempts: list[Attempt] = []
        for number, (writer, blocks, growth, family) in enumerate(case.attempts):
            key = HandoffKey(bytes([number + 1]) * 16, 1)
            delivery = Delivery(key, range(blocks), tokens=blocks, block_tokens=1)
            self.attempts.append(Attempt(writer, family, delivery, growth))
            if case.computed:
                delivery.computed(blocks)
                delivery.first_token()
            self.say("open", key, writer)

    # -- what can happen -----------------------------------------------------------------------------------------

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
        found += [("release", key) for key in self.ledger_keys(GrantState.RESIDENT)]
        for writer in self.alive:
            found += [(name, writer) for name in ("crash", "break") if self.left[name] and self._may(name, writer)]
            if self.now and self.left["renew"]:
                found.append(("renew", writer))
        if self.left["tick"]:
            found.append(("tick",))
        leases = len(self.ledger._handoffs) + len(self.ledger._writers)
        if leases and not any(action[0] in FAIR for action in found):
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
        if up and delivery.ticket is not None and delivery.state is DeliveryState.DELIVERING and self._ready(delivery):
            found.append(("write", number))
        again = delivery.key.handoff < self.case.handoffs and not attempt.cancelled
        if delivery.state is DeliveryState.FAILED and again:
            found.append(("rebind", number))
        if delivery.state in (DeliveryState.AWAITING_GRANT, DeliveryState.COMMITTING) and self.left["timeout"]:
            found.append(("timeout", number))
        if not attempt.cancelled and self.left["cancel"]:
            found.append(("cancel", number))
        return found

    @staticmethod
    def _ready(delivery: Delivery) -> bool:
        return delivery._next < delivery.complete_blocks

    def act(self, action: Action) -> None:
        """Does it, and what follows from it at once."""
        name = str(action[0])
        if name not in FAIR:
            self.left[name] -= 1
        getattr(self, f"do_{name}")(*action[1:])
        for attempt in self.attempts:
            if attempt.writer in self.alive:
                self._advance(attempt)
        self.pool._free.sort(reverse=True)  # which of the free ones is next does not matter

    def _advance(self, attempt: Attempt) -> None:
        delivery, up = attempt.delivery, attempt.writer not in self.wires.down
        ticket = delivery.ticket
        if up and ticket is not None and (blocks := delivery.take_commit()) is not None:
            self.say("commit", delivery.key, ticket.generation, blocks)
        for key in delivery.take_closed():
            self.send_close(attempt.writer, key)

    # -- the prefill worker --------------------------------------------------------------------------------------

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

    def lose_closes(self, keys: list[HandoffKey]) -> None:
        """Closes that the peer may not have heard are owed again."""
        self.wires.lost += [key for key in keys if key not in self.wires.lost]

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

    def send_close(self, writer: int, key: HandoffKey) -> None:
        if writer in self.wires.down:
            self.lose_closes([key])
        else:
            self.say("close", key)

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
        elif attempt.delivery.granted(ticket) is GrantAnswer.INVALID:
            raise Violation(f"{key}: an invalid grant")

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

    # -- the decode worker ---------------------------------------------------------------------------------------

    def on_open(self, key: HandoffKey, writer: int) -> None:
        attempt = self.of(key)
        blocks = len(attempt.delivery.source)
        digests = [bytes([attempt.family, i]) * 8 for i in range(blocks - 1)]
        total = blocks + attempt.growth
        answer = self.ledger.open(key, f"w{writer}", digests, blocks, total, self.now)
        if isinstance(answer, Refusal):
            self.say("refused", key)
            return
        if self.ledger.state(key) is not GrantState.RESIDENT:
            self.pending[key] = writer
            self.admitted[key] = answer.ticket
        self.say("grant", key, answer.ticket)

    def on_commit(self, key: HandoffKey, generation: int, blocks: int) -> None:
        outcome = self.ledger.commit(key, generation, blocks, "token", self.now)
        self._settled(key, outcome)
        if outcome is Outcome.ALREADY:
            self.say("committed", key)
        elif outcome is Outcome.IGNORED and self.ledger.state(key) is not GrantState.ABORTING:
            self.say("refused", key)

    def on_close(self, key: HandoffKey) -> None:
        self.ledger.closed(key, self.now, proof=self.case.closes_prove and key in self.pending)
        self._check_freed(key)

    def on_cancel_there(self, key: HandoffKey) -> None:
        self.ledger.cancel(key.attempt, self.now)

    def on_abort(self, aborted: Aborted) -> None:
        key = aborted.grant.key
        if key in self.pending:
            self.revoke(key)
            self.say("abort", key)
            if aborted.proven:
                self._check_freed(key)

    def revoke(self, key: HandoffKey) -> None:
        self.admitted.pop(key, None)
        if not self.case.closes_prove:
            self.wires.revoking.append(key)

    def do_release(self, key: HandoffKey) -> None:
        grant = self.ledger.grant(key)
        assert grant is not None
        self.check_content(grant)
        self.ledger.release(key, self.now)

    def do_renew(self, writer: int) -> None:
        self.ledger.renew(f"w{writer}", self.now)

    def do_tick(self) -> None:
        self.now += TICK_S
        self.ledger.expire(self.now)

    def do_pass(self) -> None:
        """Nothing else can happen, so time goes on."""
        self.now += LEASE_S + HANDOFF_S
        self.ledger.expire(self.now)

    def on_landed(self, key: HandoffKey, generation: int, index: int) -> None:
        self._settled(key, self.ledger.landed(key, generation, [index], self.now))

    def on_revoked(self, key: HandoffKey) -> None:
        if self.ledger.state(key) is GrantState.ABORTING:
            self.ledger.proved(key)
            self._check_freed(key)

    def on_writer_gone(self, writer: int) -> None:
        self.ledger.writer_gone(f"w{writer}", self.now)
        for key in [key for key, owner in self.pending.items() if owner == writer]:
            self._check_freed(key)

    def _settled(self, key: HandoffKey, outcome: Outcome) -> None:
        if outcome is Outcome.RESIDENT:
            grant = self.ledger.grant(key)
            assert grant is not None
            self.check_content(grant)
            self.pending.pop(key)
            self.revoke(key)
            self.say("committed", key)
        elif outcome is Outcome.CONFLICT:
            raise Violation(f"{key}: a message contradicts the grant")

    def _check_freed(self, key: HandoffKey) -> None:
        if self.ledger.state(key) is None:
            self.pending.pop(key, None)

    # -- the transport -------------------------------------------------------------------------------------------

    def do_place(self, index: int) -> None:
        """The last bytes of a block arrive; the receiver says so if the ticket is good, and else refuses it."""
        write = self.wires.writes.pop(index)
        key, attempt = write.ticket.key, self.of(write.ticket.key)
        good = self.admitted.get(key) == write.ticket
        self.content[write.move.destination] = (attempt.family, write.move.index)
        if good:
            self.wires.events.append(("landed", key, write.ticket.generation, write.move.index))
        if write.orphan:
            return
        if good:
            attempt.delivery.written(key, [write.move])
        else:
            attempt.delivery.write_failed(key, [write.move], "revoked")

    def do_drain(self, index: int) -> None:
        """Nothing more comes of an orphan."""
        del self.wires.writes[index]

    def do_revoke(self, key: HandoffKey) -> None:
        """The receiving thread has seen the revocation; connections in the middle of a block are closed."""
        self.wires.revoking.remove(key)
        for write in [write for write in self.wires.writes if write.ticket.key == key]:
            self.wires.writes.remove(write)
            if not write.orphan:
                self.of(key).delivery.write_failed(key, [write.move], "closed")
        self.wires.events.append(("revoked", key))

    # -- messages ------------------------------------------------------------------------------------------------

    def say(self, *message: object) -> None:
        """On the control stream, unless it is down: then it is lost, as everything on it."""
        key = message[1]
        assert isinstance(key, HandoffKey)
        writer = self.of(key).writer
        if writer in self.alive and writer not in self.wires.down:
            self.wires.messages.append(message)

    def do_deliver(self, message: Message) -> None:
        self.wires.messages.remove(message)
        self.do_duplicate(message)

    def do_duplicate(self, message: Message) -> None:
        name = "abort_notice" if message[0] == "abort" else message[0]
        getattr(self, f"on_{name}")(*message[1:])

    def do_event(self, event: Message) -> None:
        self.wires.events.remove(event)
        getattr(self, f"on_{event[0]}")(*event[1:])

    def _about(self, message: Message, writer: int) -> bool:
        """Whether it travels on this writer's control stream; cancels come from the router."""
        key = message[1]
        assert isinstance(key, HandoffKey)
        return not str(message[0]).startswith("cancel") and self.of(key).writer == writer

    def _to_writer(self, message: Message, writer: int) -> bool:
        return self._about(message, writer) and message[0] in ("grant", "refused", "abort", "committed")

    def of(self, key: HandoffKey) -> Attempt:
        return self.attempts[key.attempt[0] - 1]

    def ledger_keys(self, state: GrantState | None = None) -> list[HandoffKey]:
        return [key for key, entry in self.ledger._entries.items() if state in (None, entry.state)]

    # -- what must hold ------------------------------------------------------------------------------------------

    def check_content(self, grant: Grant) -> None:
        """A resident's prompt blocks hold what was sent, whole."""
        family = self.of(grant.key).family
        for index, block in enumerate(grant.ticket.blocks):
            if self.content[block] != (family, index):
                raise Violation(f"{grant.key}: block {block} holds {self.content[block]}")

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
                raise Violation(f"{key} may still write block {block}, which somebody else has")

    def ended(self) -> bool:
        """Every transfer is over, and nothing is left of it."""
        wires = self.wires
        quiet = not (wires.messages or wires.events or wires.writes or wires.revoking)
        over = all(a.writer not in self.alive or a.delivery.state in OVER for a in self.attempts)
        idle = all(a.writer not in self.alive or not a.delivery.in_flight for a in self.attempts)
        return quiet and over and idle and not self.ledger_keys() and self.pool.available == self.pool.blocks
