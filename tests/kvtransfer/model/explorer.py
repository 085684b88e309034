"""Breadth-first search through all states of a world, each once.

Two states are the same when nothing that can still happen tells them apart: counters, tokens, generations and the
order of free blocks are left out, times are taken relative to now, and blocks are named by what they are used for.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any, TypeVar

from baton.spec import HandoffKey
from kvtransfer.blocks.pool import BlockPool
from kvtransfer.handoffs.delivery import Delivery, DeliveryState
from kvtransfer.handoffs.grants import GrantLedger
from kvtransfer.handoffs.leases import LeaseTable
from kvtransfer.handoffs.messages import BlockMove, Grant, Refusal, Ticket
from kvtransfer.handoffs.outcomes import GrantState, LedgerEntry, LedgerLimits
from kvtransfer.handoffs.peers import AttemptMemory, Writers, _Attempt
from tests.kvtransfer.model.state import FAIR, Action, Attempt, Case, Channels, Message, Write
from tests.kvtransfer.model.world import World

Trace = tuple[Action, ...]


class Found(AssertionError):
    """A violation, and the shortest way to it."""

    def __init__(self, what: str, trace: Trace) -> None:
        super().__init__(f"{what}\n  after: " + "\n         ".join(map(str, trace)))
        self.what, self.trace = what, trace


@dataclass(frozen=True, slots=True)
class Explored:
    """How much there was. `ends` are states in which every transfer is over."""

    states: int
    steps: int
    ends: int
    complete: bool


class Explorer:
    """Explores up to `limit` states. Raises `Found` for a state that violates safety, or from which some fair course
    of events never comes to an end."""

    def __init__(self, case: Case, world_type: type[World] = World, limit: int = 1_000_000) -> None:
        self.case, self.world_type, self.limit = case, world_type, limit
        self._numbers: dict[object, int] = {}
        self._parents: list[tuple[int, Action | None]] = []
        self._fair: list[list[int]] = []
        self._ends: set[int] = set()
        self._queue: deque[tuple[int, World]] = deque()
        self._steps = 0

    def run(self) -> Explored:
        """The whole search, safety first."""
        self._visit(self.world_type(self.case), -1, None)
        while self._queue and len(self._numbers) < self.limit:
            self._expand(*self._queue.popleft())
        complete = not self._queue
        self._every_fair_course_ends({number for number, _ in self._queue})
        return Explored(len(self._numbers), self._steps, len(self._ends), complete)

    def _expand(self, number: int, origin: World) -> None:
        actions = origin.actions()
        if not any(action[0] in FAIR for action in actions) and number not in self._ends:
            raise Found("a transfer never ends", self._trace(number))
        for action in actions:
            world = copied(origin)
            self._steps += 1
            try:
                world.act(action)
                world.check()
            except AssertionError as error:  # a violation, or an assertion of the machines' own
                raise Found(f"{type(error).__name__}: {error}", (*self._trace(number), action)) from error
            successor = self._visit(world, number, action)
            if action[0] in FAIR:
                self._fair[number].append(successor)

    def _visit(self, world: World, parent: int, action: Action | None) -> int:
        key = hash(canonical(world))
        known = self._numbers.get(key)
        if known is not None:
            return known
        number = self._numbers[key] = len(self._numbers)
        self._parents.append((parent, action))
        self._fair.append([])
        if world.ended():
            self._ends.add(number)
        self._queue.append((number, world))
        return number

    def _every_fair_course_ends(self, unexplored: set[int]) -> None:
        """Fair steps alone lead from everywhere to an end, whatever their order: they never go in a circle, and only
        ends have none. (Those that `limit` left unexplored are not judged.)"""
        waiting = [0] * len(self._fair)
        for successors in self._fair:
            for successor in successors:
                waiting[successor] += 1
        ready = [number for number, count in enumerate(waiting) if not count]
        sorted_ = 0
        while ready:
            number = ready.pop()
            sorted_ += 1
            for successor in self._fair[number]:
                waiting[successor] -= 1
                if not waiting[successor]:
                    ready.append(successor)
        if sorted_ < len(self._fair):
            circle = next(number for number, count in enumerate(waiting) if count and number not in unexplored)
            raise Found("a transfer goes in circles", self._trace(circle))

    def _trace(self, number: int) -> Trace:
        found: list[Action] = []
        while number >= 0:
            number, action = self._parents[number]
            if action is not None:
                found.append(action)
        return tuple(reversed(found))


T = TypeVar("T")
MUTABLE = (BlockPool, GrantLedger, AttemptMemory, Writers, LeaseTable, Delivery, World)
MUTABLE_SLOTS = (LedgerEntry, _Attempt, Write, Attempt, Channels)
ATOMS = frozenset({int, float, str, bytes, bool, tuple, type(None), GrantState, DeliveryState, Case, LedgerLimits}) | {
    HandoffKey,
    Ticket,
    Grant,
    Refusal,
    BlockMove,
}


def copied(value: T) -> T:
    """A copy that shares only what never changes. `copy.deepcopy` does the same ten times slower."""
    return _copy(value, {})  # type: ignore[no-any-return]


def _copy(value: Any, known: dict[int, Any]) -> Any:
    kind = type(value)
    if kind in ATOMS:
        return value
    if kind is dict:
        return {key: item if type(item) in ATOMS else _copy(item, known) for key, item in value.items()}
    if kind is Counter or kind is OrderedDict:
        return value.copy()
    if kind is list:
        return [_copy(item, known) for item in value] if value and isinstance(value[0], MUTABLE_SLOTS) else value[:]
    if kind is set:
        return value.copy()
    if kind is MethodType:
        return MethodType(value.__func__, known[id(value.__self__)])
    if isinstance(value, MUTABLE):
        if id(value) not in known:
            new = known[id(value)] = object.__new__(kind)
            new.__dict__.update(_copy(value.__dict__, known))
        return known[id(value)]
    if isinstance(value, MUTABLE_SLOTS):
        new = object.__new__(kind)
        for name in kind.__slots__:
            setattr(new, name, _copy(getattr(value, name), known))
        return new
    return value


def canonical(world: World) -> object:
    """What tells this state from others: all of it, so this alone reads what the machines keep to themselves."""
    ledger, pool, wires = world.ledger, world.pool, world.wires
    order = _order(world)
    name = {block: number for number, block in enumerate(order)}

    def renamed(blocks: Iterable[int]) -> tuple[int, ...]:
        return tuple([name[block] for block in blocks])

    entries = [
        (
            key,
            entry.state.value,
            entry.committed,
            frozenset(entry.missing),
            renamed(entry.grant.ticket.blocks),
            entry.grant.ticket.cached_blocks,
            renamed(entry.grant.growth),
            renamed(entry.table),
            frozenset(renamed(entry.quarantined)),
            entry.grant.writer,
        )
        for key, entry in ledger._entries.items()
    ]
    remembered = [
        (attempt, known.highest, known.ended and known.ended.reason.value, known.cancelled)
        for attempt, known in ledger.attempts._attempts.items()
    ]
    writers = ledger.writers
    deliveries = [
        (
            attempt.cancelled,
            delivery.key,
            delivery.state.value,
            delivery._computed,
            delivery._next,
            frozenset(delivery._under_way.items()),
            frozenset(delivery._to_close),
            delivery.ticket and delivery.ticket.key,
        )
        for attempt in world.attempts
        for delivery in [attempt.delivery]
    ]
    return (
        frozenset(entries),
        frozenset(remembered),
        _relative(writers._leases, world.now),
        frozenset(writers._ended._until),
        _relative(ledger._handoffs, world.now),
        tuple([pool._holds[block] for block in order]),
        tuple([pool._digest[block] for block in order]),
        renamed(pool._cached),
        renamed(pool._protected),
        tuple([pool._found[block] for block in order]),
        frozenset(renamed(pool._quarantined)),
        tuple([None if block in pool._free else world.content[block] for block in order]),
        tuple(deliveries),
        frozenset(_counted([_named(message, renamed) for message in wires.messages])),
        frozenset(_counted(wires.events)),
        frozenset(_counted([(w.ticket.key, w.move.index, name[w.move.destination], w.orphan) for w in wires.writes])),
        frozenset(_counted(wires.revoking)),
        frozenset(wires.lost),
        frozenset(wires.down),
        frozenset(world.admitted),
        frozenset(world.pending),
        frozenset(world.alive),
        frozenset(world.claimed) if world.case.closes_prove else None,
        tuple(sorted(world.left.items())),
        tuple(sorted(world.waiting.items())),
        frozenset(world.stalled),
    )


def _order(world: World) -> list[int]:
    """All blocks, in an order that follows from what they are used for. Which number a block has does not matter, so
    states that differ in that alone become the same."""
    pool = world.pool
    tables = (block for _, entry in sorted(world.ledger._entries.items(), key=_age) for block in entry.table)
    return list(dict.fromkeys((*tables, *pool._cached, *pool._protected, *range(pool.blocks))))


def _age(item: tuple[HandoffKey, object]) -> tuple[bytes, int]:
    return item[0].attempt, item[0].handoff


def _named(message: Message, renamed: Callable[[Iterable[int]], tuple[int, ...]]) -> object:
    return tuple(
        (part.key, renamed(part.blocks), part.cached_blocks) if isinstance(part, Ticket) else part for part in message
    )


def _counted(items: Sequence[object]) -> list[tuple[object, int]]:
    return [(item, items.count(item)) for item in set(items)]


def _relative(table: LeaseTable[Any], now: float) -> frozenset[tuple[object, float]]:
    return frozenset((key, until - now) for key, until in table._until.items())
