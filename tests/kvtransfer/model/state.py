"""A pair of workers and all that is between them, small enough to be explored in full.

The state machines are the real ones: `Delivery`, `GrantLedger` with its leases, writers and memory of attempts,
`BlockPool`. What carries their messages is modelled: a control stream that loses, repeats and reorders, a transport
that may still place bytes after all have given up, a router that binds again and cancels. The glue follows
`baton.worker.sending.sender` and `decode_worker.service`.

A resident may need more blocks than it was granted. It takes them one at a time, and is stalled while the pool is dry.
Then the youngest resident is preempted, and goes on later on the same worker, computed again from what the cache has
left of it. Whatever comes free goes to stalled residents first, at once; the preempted one waits for more than it had.

An action is a tuple, its name first. Those of `FAIR` happen sooner or later once they are possible; the others are the
adversary's, which has a budget of each.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from baton.spec import HandoffKey
from kvtransfer.blocks.pool import BlockPool
from kvtransfer.handoffs.delivery import Delivery, DeliveryState
from kvtransfer.handoffs.grants import GrantLedger
from kvtransfer.handoffs.messages import Aborted, BlockMove, Ticket
from kvtransfer.handoffs.outcomes import GrantState, LedgerLimits

LEASE_S, TICK_S, HANDOFF_S, FOR_EVER = 5.0, 3.0, 8.0, 1e9
OVER = (DeliveryState.FAILED, DeliveryState.RELEASED)
FAIR = frozenset(
    {"deliver", "write", "place", "drain", "event", "revoke", "compute", "release", "rebind", "reconnect", "pass"}
    | {"grow", "preempt", "resume"}
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
    grows: int = 0
    """Blocks that each resident takes beyond its grant."""


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
    taken: int = 0
    """Leading blocks that the accepted grant found in the cache or that were handed to the transport since."""


def no_token() -> bytes:
    return bytes(16)


class SortedPool(BlockPool):
    def sort(self) -> None:
        """Which of the free blocks is next does not matter: states that differ in that are the same."""
        self._free.sort(reverse=True)


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


class State:
    """One state, and what both sides do. The types are there to be broken by mutants."""

    ledger_type = GrantLedger
    delivery_type = Delivery

    def __init__(self, case: Case) -> None:
        self.case = case
        self.now = 0.0
        self.left = Counter(case.budget)
        self.pool = SortedPool(case.blocks)
        limits = LedgerLimits(lease_s=LEASE_S, handoff_s=HANDOFF_S, tombstone_s=FOR_EVER)
        self.ledger = self.ledger_type(self.pool, limits, self.on_abort, no_token)
        self.admitted: dict[HandoffKey, Ticket] = {}
        self.pending: dict[HandoffKey, int] = {}
        self.wires = Channels()
        self.alive: set[int] = {writer for writer, *_ in case.attempts}
        self.claimed: set[HandoffKey] = set()
        self.content: list[object] = [None] * case.blocks
        self.stalled: set[HandoffKey] = set()
        """Residents whose next position has no block."""
        self.waiting: dict[int, int] = {}
        """The blocks that each preempted sequence waits for, by its attempt's number; smaller ones are older."""
        self.attempts: list[Attempt] = []
        for number, (writer, blocks, growth, family) in enumerate(case.attempts):
            key = HandoffKey(bytes([number + 1]) * 16, 1)
            delivery = self.delivery_type(key, range(blocks), tokens=blocks, block_tokens=1)
            self.attempts.append(Attempt(writer, family, delivery, growth))
            if case.computed:
                delivery.computed(blocks)
                delivery.first_token()
            self.say("open", key, writer)

    def of(self, key: HandoffKey) -> Attempt:
        return self.attempts[key.attempt[0] - 1]

    def ledger_keys(self, state: GrantState | None = None) -> list[HandoffKey]:
        bound = [attempt.delivery.key for attempt in self.attempts]
        opened = [HandoffKey(last.attempt, number) for last in bound for number in range(1, last.handoff + 1)]
        opened += [self.here(number) for number in range(len(self.attempts))]
        states = ((key, self.ledger.state(key)) for key in opened)
        return [key for key, found in states if found is not None and state in (None, found)]

    @staticmethod
    def here(number: int) -> HandoffKey:
        """The key under which a preempted sequence goes on in place."""
        return HandoffKey(bytes([number + 1]) + bytes(15), 0)

    def send_close(self, writer: int, key: HandoffKey) -> None:
        if writer in self.wires.down:
            self.lose_closes([key])
        else:
            self.say("close", key)

    def lose_closes(self, keys: list[HandoffKey]) -> None:
        """Closes that the peer may not have heard are owed again."""
        self.wires.lost += [key for key in keys if key not in self.wires.lost]

    def say(self, *message: object) -> None:
        """On the control stream, unless it is down: then it is lost, as everything on it."""
        key = message[1]
        assert isinstance(key, HandoffKey)
        writer = self.of(key).writer
        if writer in self.alive and writer not in self.wires.down:
            self.wires.messages.append(message)

    def revoke(self, key: HandoffKey) -> None:
        self.admitted.pop(key, None)
        if not self.case.closes_prove:
            self.wires.revoking.append(key)

    def on_abort(self, aborted: Aborted) -> None:
        key = aborted.grant.key
        if key in self.pending:
            self.revoke(key)
            self.say("abort", key)
            if aborted.proven:
                self._check_freed(key)

    def _check_freed(self, key: HandoffKey) -> None:
        if self.ledger.state(key) is None:
            self.pending.pop(key, None)
