"""A worker as the router sees it: its registration, and the load that is placed on it.

JOINING -> USABLE <-> DETACHED -> LOST      owned by the registry; LOST is final, a worker that returns is a new Worker
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from baton.config import RoleName
from baton.cost import HandoffTimes, StepCost
from baton.messages import LoadReport
from baton.model import ModelCard
from baton.spec import ProcessRef
from router.placement.accuracy import Accuracy
from router.placement.snapshot import DecodeLoad, PrefillLoad
from router.workers.ledger import DecodeLedger, PrefillLedger
from router.workers.link import WorkerLink


@dataclass(frozen=True, slots=True)
class Registration:
    process: ProcessRef
    roles: frozenset[RoleName]
    card: ModelCard
    blocks: int
    max_sequences: int
    transports: tuple[str, ...]


@dataclass(eq=False, slots=True)
class Worker:
    """One incarnation of a worker, from its registration until it is lost. Compared by identity."""

    registration: Registration
    link: WorkerLink
    lease_until: float
    language_ready: bool = False
    lost: bool = False
    load: LoadReport | None = None
    cost: StepCost | None = None
    chunk_tokens: int = 512
    accuracy: Accuracy = field(default_factory=Accuracy)
    handoffs: HandoffTimes = field(default_factory=HandoffTimes)
    chosen_at: float = 0.0
    probed_at: float | None = None
    """When a probe was last admitted, or could first have been."""
    name: str = field(init=False)
    prefill: PrefillLedger = field(init=False)
    decode: DecodeLedger = field(init=False)
    watchers: dict[RoleName, Callable[[Worker], None]] = field(default_factory=dict)
    """By role: called after each change of the worker's load."""

    def __post_init__(self) -> None:
        self.name = self.registration.process.name  # a field, because placement reads it so often
        self.prefill = PrefillLedger(self._changed)
        self.decode = DecodeLedger(self.registration.blocks, self._changed)

    def __str__(self) -> str:
        return self.name

    @property
    def process(self) -> ProcessRef:
        return self.registration.process

    @property
    def card(self) -> ModelCard:
        return self.registration.card

    @property
    def usable(self) -> bool:
        """New work may be placed here."""
        return not self.lost and self.language_ready and self.link.attached and not self.link.watch.stalled

    @property
    def busy(self) -> bool:
        """It has sequences of ours."""
        return len(self.prefill) + len(self.decode) > 0

    @property
    def away(self) -> bool:
        """Its stream broke, or it does not move. It may come back; what is sent to it waits for that."""
        broken = not self.link.attached and self.link.breaks > 0
        stalled = self.link.attached and bool(self.link.watch.stalled)
        return not self.lost and self.language_ready and (broken or stalled)

    def reported(self, load: LoadReport) -> None:
        self.load = load
        if load.cost is not None:
            self.cost, self.chunk_tokens = load.cost, load.chunk_tokens or self.chunk_tokens
        self.prefill.reported(load.waiting_tokens)
        # Granted blocks are in the ledger as bound: they would be taken off twice until the sequence is resident.
        free = load.free_blocks + load.cached_blocks + load.granted_blocks - load.promised_blocks
        self.decode.reported(free, load.resident_tokens)

    def keepable(self, tpot_s: float | None) -> float | None:
        """The objective per token if a step with one more sequence could keep it, else None: an impossible objective
        must not count against later requests."""
        if tpot_s is None or self.cost is None or not self.cost.knows_decode:
            return tpot_s
        return tpot_s if self.cost.decode(len(self.decode) + 1, self.decode.tokens) <= tpot_s else None

    def _changed(self) -> None:
        for watcher in self.watchers.values():
            watcher(self)

    def prefill_load(self, now: float, cached_tokens: int = 0) -> PrefillLoad:
        """This worker in a snapshot, for a prompt of which it holds `cached_tokens`."""
        return PrefillLoad(
            self.name,
            self.prefill.queued_tokens,
            self.registration.blocks,
            self.cost,
            self.chunk_tokens,
            self.prefill.queue(now),
            cached_tokens,
            self.accuracy.factor,
            self.chosen_at,
        )

    def decode_load(self, now: float, cached_tokens: int = 0) -> DecodeLoad:
        """This worker in a snapshot, for a prompt of which it holds `cached_tokens`."""
        decode = self.decode
        return DecodeLoad(
            self.name,
            decode.tokens,
            len(decode),
            decode.free_blocks,
            self.registration.blocks,
            self.registration.max_sequences,
            self.cost,
            self.chunk_tokens,
            decode.strictest_s,
            self.prefill.queue(now),
            cached_tokens,
            self.accuracy.factor,
            decode.mean_blocks * self.card.kv_layout.block_tokens,
            self.chosen_at,
            self.handoffs.expected_s,
        )
