"""The receiver's ledger: what a decode worker has granted, and who may still write it.

    open ──> GRANTED ──landed──> RECEIVING ──committed and all landed──> RESIDENT ──release──> RELEASED
                │                    │
                └──── abort, expire, cancel, closed, a newer handoff
                                     v
                                 ABORTING ──proved, writer_gone──> RELEASED

On abort the blocks that no peer could write (matched in the cache, reserved growth) go back at once. Those that the
writer may still write are quarantined until there is proof that it does not: its own Closed where the transport's
writes end with the writer's word (shm), the transport's `revoked`, or the end of the writer's process. Time proves
nothing. Blocks enter the prefix index only when the sequence becomes RESIDENT.

Messages may be duplicated, late or reordered. Those about an unknown, finished or superseded handoff, or with another
generation, change nothing and are counted.
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from baton.spec import AttemptKey, HandoffKey, RefusalReason
from baton.telemetry import Counts
from kvtransfer.blocks.pool import BlockPool, PoolCorrupt
from kvtransfer.handoffs.attempts import AttemptMemory
from kvtransfer.handoffs.leases import LeaseTable
from kvtransfer.handoffs.messages import WRITE_TOKEN_BYTES, Aborted, Grant, Refusal, Ticket
from kvtransfer.handoffs.outcomes import Cancelled, GrantState, LedgerLimits, LedgerStatistics, Outcome
from kvtransfer.handoffs.writers import Writers


@dataclass(slots=True)
class _Entry:
    grant: Grant
    digests: tuple[bytes, ...]
    missing: set[int]
    table: list[int]
    state: GrantState = GrantState.GRANTED
    committed: bool = False
    payload: object = None
    quarantined: list[int] = field(default_factory=list)


class GrantLedger:
    """Pure: no clock, no I/O; `now` is monotonic seconds. Not thread-safe: the loop that owns the pool owns it.

    `on_abort` is called at once for each grant that is given up, whatever the cause, after the ledger has changed.
    """

    def __init__(
        self,
        pool: BlockPool,
        limits: LedgerLimits | None = None,
        on_abort: Callable[[Aborted], None] | None = None,
        mint_token: Callable[[], bytes] = lambda: secrets.token_bytes(WRITE_TOKEN_BYTES),
        counts: Counts | None = None,
    ) -> None:
        self.pool = pool
        self.limits = limits or LedgerLimits()
        self.counts = counts or Counts()
        self._on_abort = on_abort
        self._mint_token = mint_token
        self._entries: dict[HandoffKey, _Entry] = {}
        self._attempts = AttemptMemory(self.limits.tombstone_s, self.limits.tombstones)
        self._writers = Writers(self.limits.lease_s, self.limits.tombstone_s)
        self._handoffs: LeaseTable[HandoffKey] = LeaseTable()
        self._generation = 0

    def open(
        self,
        key: HandoffKey,
        writer: str,
        digests: Sequence[bytes],
        prompt_blocks: int,
        total_blocks: int,
        now: float,
        deadline: float | None = None,
    ) -> Grant | Refusal:
        """Reserve room for a sequence whose prompt fills `prompt_blocks` (the last perhaps in part) of at most
        `total_blocks`; `digests` are those of its complete prompt blocks. A duplicate gets the very same answer.

        `writer` is the sender's incarnation; `deadline` (monotonic seconds) may shorten the time to become resident.
        """
        assert 1 <= prompt_blocks <= total_blocks, "a sequence is not shorter than its prompt"
        assert len(digests) <= prompt_blocks, "more digests than prompt blocks"
        if (known := self._entries.get(key)) is not None:
            return self._again(known, writer, now)
        if (refusal := self._attempts.verdict(key)) is not None:
            return self._count(refusal)
        seconds = self.limits.handoff_s if deadline is None else min(self.limits.handoff_s, deadline - now)
        if seconds <= 0:
            return self._count(Refusal(key, RefusalReason.EXPIRED, "the handoff's deadline has passed"))
        if self._writers.has_ended(writer):
            return self._count(Refusal(key, RefusalReason.EXPIRED, "the sender's process has ended"))
        older = self._attempts.latest(key.attempt)
        if older is not None and older in self._entries:
            if self._entries[older].state is GrantState.RESIDENT:
                return self._count(Refusal(key, RefusalReason.EXPIRED, f"resident already, by handoff {older.handoff}"))
            self.abort(older, RefusalReason.EXPIRED, now, f"handoff {key.handoff} takes its place")
        granted = self._reserve(key, writer, digests, prompt_blocks, total_blocks)
        if isinstance(granted, Refusal):
            self._attempts.ended(granted, now)
            return self._count(granted)
        self._handoffs.grant(key, now, seconds)
        self._attempts.opened(key)
        self._writers.add(writer, key)
        self._writers.heard(writer, now)
        return granted

    def landed(self, key: HandoffKey, generation: int, indices: Iterable[int], now: float) -> Outcome:
        """These blocks of the sequence are in place, whole."""
        entry = self._current(key, generation, "landed")
        if entry is None:
            return Outcome.IGNORED
        if entry.state is GrantState.RESIDENT:
            return Outcome.ALREADY
        arrived = set(indices)
        if any(entry.grant.ticket.destination(index) is None for index in arrived):
            self.counts.add("grant_landed_conflict")
            return Outcome.CONFLICT
        entry.missing -= arrived
        entry.state = GrantState.RECEIVING
        return self._settle(entry, now)

    def commit(self, key: HandoffKey, generation: int, blocks: int, payload: object, now: float) -> Outcome:
        """The sender is done: it wrote `blocks` blocks, or has them on the way. `payload` (the first token) is the
        caller's own; the first commit's stays."""
        entry = self._current(key, generation, "commit")
        if entry is None:
            return Outcome.IGNORED
        if entry.state is GrantState.RESIDENT:
            return Outcome.ALREADY
        if blocks != len(entry.grant.ticket.writable):
            self.counts.add("grant_commit_conflict")
            return Outcome.CONFLICT
        if not entry.committed:
            entry.committed, entry.payload = True, payload
        return self._settle(entry, now)

    def abort(self, key: HandoffKey, reason: RefusalReason, now: float, message: str = "") -> bool:
        """Give a grant up. False, and no change, when it is unknown, resident or given up already."""
        entry = self._entries.get(key)
        if entry is None or entry.state in (GrantState.RESIDENT, GrantState.ABORTING):
            return False
        grant = entry.grant
        proven = self._writers.has_ended(grant.writer) or not grant.written
        entry.state, entry.payload = GrantState.ABORTING, None
        self._handoffs.drop(key)
        self.pool.release(grant.growth)
        self.pool.release(grant.cached)
        entry.quarantined = self.pool.quarantine(grant.written)
        text = message or f"handoff given up: {reason.name.lower()}"
        self._attempts.ended(Refusal(key, reason, text), now)
        self.counts.add(f"grant_abort_{reason.name.lower()}")
        if proven:
            self._free(entry)
        if self._on_abort is not None:
            self._on_abort(Aborted(grant, reason, text, proven))
        return True

    def closed(self, key: HandoffKey, now: float, proof: bool) -> bool:
        """The writer says that it writes nothing more under this handoff. `proof`: its word suffices, as with shm;
        with tcp its bytes may still be on the way, so there `proved` follows when the transport has revoked.
        Whether a live grant was given up."""
        gave_up = self.abort(key, RefusalReason.CANCELLED, now, "the sender closed the handoff")
        if proof:
            self.proved(key)
        return gave_up

    def proved(self, key: HandoffKey) -> bool:
        """No more bytes of this handoff can arrive. Ends its quarantine; False, and no change, when it has none."""
        entry = self._entries.get(key)
        if entry is None or entry.state is not GrantState.ABORTING:
            self.counts.add("grant_proof_late")
            return False
        self._free(entry)
        return True

    def writer_gone(self, incarnation: str, now: float) -> None:
        """The writer's process has ended: give up its grants and end their quarantine. Residents stay."""
        self._writers.end(incarnation, now)
        for key in self._writers.handoffs(incarnation):
            if not self.abort(key, RefusalReason.UNREACHABLE, now, "the sender's process has ended"):
                self.proved(key)

    def cancel(self, attempt: AttemptKey, now: float) -> Cancelled:
        """Give the attempt's handoff up and refuse any later one, also when the attempt is not known yet."""
        latest = self._attempts.latest(attempt)
        entry = self._entries.get(latest) if latest else None
        resident = entry.grant if entry is not None and entry.state is GrantState.RESIDENT else None
        self._attempts.cancelled(attempt, now, live=resident is not None)
        aborted = latest is not None and self.abort(latest, RefusalReason.CANCELLED, now, "the attempt was cancelled")
        return Cancelled(aborted, resident)

    def is_cancelled(self, attempt: AttemptKey) -> bool:
        """Whether its cancel has come, as far as that is remembered."""
        return self._attempts.is_cancelled(attempt)

    def renew(self, writer: str, now: float) -> bool:
        """Extend all grants of one writer by a lease. False when it has none that is live."""
        return self._writers.renew(writer, now)

    def expire(self, now: float) -> None:
        """Give up what ran out by `now`: the grants of silent writers, and handoffs that took too long."""
        for writer in self._writers.expire(now):
            for key in self._writers.handoffs(writer):
                self.abort(key, RefusalReason.EXPIRED, now, "the sender's lease ran out")
        for key in self._handoffs.expire(now):
            self.abort(key, RefusalReason.EXPIRED, now, "the handoff took too long")
        self._attempts.expire(now)

    def release(self, key: HandoffKey, now: float, digests: Sequence[bytes] = ()) -> bool:
        """A resident is finished: give its blocks back. Those that carry a digest stay CACHED; `digests` names the
        complete blocks from the start of the sequence, output included, for the next turn. False when not resident."""
        entry = self._entries.get(key)
        if entry is None or entry.state is not GrantState.RESIDENT:
            self.counts.add("grant_release_late")
            return False
        self._index(entry.table, digests)
        del self._entries[key]
        self.pool.release(entry.table)
        self._attempts.ended(Refusal(key, RefusalReason.EXPIRED, "the sequence is finished"), now)
        return True

    def hold(self, key: HandoffKey, blocks: Sequence[int]) -> None:
        """A sequence that no peer writes is resident from the start: the ledger owns these blocks from now on."""
        assert key not in self._entries, "a sequence is held once"
        grant = Grant(Ticket(key, 0, bytes(WRITE_TOKEN_BYTES), tuple(blocks), len(blocks), ""), ())
        self._entries[key] = _Entry(grant, (), set(), list(blocks), GrantState.RESIDENT)
        self._attempts.opened(key)

    def table(self, key: HandoffKey) -> list[int]:
        """The blocks of a resident in order of position. A block that the caller appends, allocated from the pool, is
        the resident's too and is freed with it."""
        return self._entries[key].table

    def state(self, key: HandoffKey) -> GrantState | None:
        """None when unknown or RELEASED."""
        entry = self._entries.get(key)
        return entry.state if entry else None

    def grant(self, key: HandoffKey) -> Grant | None:
        entry = self._entries.get(key)
        return entry.grant if entry else None

    def payload(self, key: HandoffKey) -> object:
        """What came with the commit; None before it."""
        entry = self._entries.get(key)
        return entry.payload if entry else None

    def statistics(self) -> LedgerStatistics:
        states = Counter(entry.state for entry in self._entries.values())
        return LedgerStatistics(
            granted=states[GrantState.GRANTED],
            receiving=states[GrantState.RECEIVING],
            resident=states[GrantState.RESIDENT],
            aborting=states[GrantState.ABORTING],
            quarantined_blocks=sum(len(entry.quarantined) for entry in self._entries.values()),
            writers=len(self._writers),
            tombstones=self._attempts.tombstones,
        )

    def check_integrity(self) -> None:
        """Raises `PoolCorrupt` where the ledger and its pool disagree. O(pool + granted blocks)."""
        self.pool.check_integrity()
        holds: Counter[int] = Counter()
        quarantined: list[int] = []
        for entry in self._entries.values():
            if entry.state is GrantState.ABORTING:
                quarantined += entry.quarantined
            else:
                holds.update(entry.table)
        if any(self.pool.holds(block) < count for block, count in holds.items()):
            raise PoolCorrupt("a granted block is not held")
        if len(set(quarantined)) != len(quarantined) or not all(map(self.pool.quarantined, quarantined)):
            raise PoolCorrupt("an abandoned block is not quarantined, or twice")
        if len(quarantined) != self.pool.statistics().quarantined:
            raise PoolCorrupt("a quarantined block belongs to no handoff")

    def _again(self, entry: _Entry, writer: str, now: float) -> Grant | Refusal:
        grant = entry.grant
        if entry.state is GrantState.ABORTING:
            ended = self._attempts.verdict(grant.key)
            return self._count(ended or Refusal(grant.key, RefusalReason.EXPIRED, "the handoff was given up"))
        if grant.writer != writer:
            return self._count(Refusal(grant.key, RefusalReason.EXPIRED, "the handoff belongs to another sender"))
        self._writers.heard(writer, now)
        self.counts.add("grant_open_duplicate")
        return grant

    def _reserve(
        self, key: HandoffKey, writer: str, digests: Sequence[bytes], prompt_blocks: int, total_blocks: int
    ) -> Grant | Refusal:
        if total_blocks > self.pool.blocks:
            text = f"the sequence may need {total_blocks} blocks, the pool has {self.pool.blocks}"
            return Refusal(key, RefusalReason.TOO_LARGE, text)
        cached = self.pool.match(digests)
        fresh = self.pool.allocate(total_blocks - len(cached))
        if fresh is None:
            self.pool.release(cached)
            text = f"{total_blocks - len(cached)} blocks are needed, {self.pool.available} are available"
            return Refusal(key, RefusalReason.NO_CAPACITY, text, self.limits.retry_after_s)
        prompt = tuple(cached + fresh[: prompt_blocks - len(cached)])
        growth = tuple(fresh[prompt_blocks - len(cached) :])
        self._generation += 1
        grant = Grant(Ticket(key, self._generation, self._mint_token(), prompt, len(cached), writer), growth)
        self._entries[key] = _Entry(grant, tuple(digests), set(grant.ticket.writable), list(grant.table))
        return grant

    def _current(self, key: HandoffKey, generation: int, what: str) -> _Entry | None:
        entry = self._entries.get(key)
        if entry is None or entry.state is GrantState.ABORTING:
            self.counts.add(f"grant_{what}_late")
            return None
        if entry.grant.generation != generation:
            self.counts.add(f"grant_{what}_wrong_generation")
            return None
        return entry

    def _settle(self, entry: _Entry, now: float) -> Outcome:
        if not entry.committed or entry.missing:
            return Outcome.PENDING
        entry.state = GrantState.RESIDENT
        key = entry.grant.key
        self._handoffs.drop(key)
        self._writers.discard(entry.grant.writer, entry.grant.key)
        self._index(entry.grant.table, entry.digests)
        self.counts.add("grant_resident")
        return Outcome.RESIDENT

    def _index(self, table: Sequence[int], digests: Sequence[bytes]) -> None:
        for block, digest in zip(table, digests, strict=False):
            self.pool.insert(block, digest)

    def _free(self, entry: _Entry) -> None:
        """Aborting is over: there is proof."""
        self.pool.unquarantine(entry.quarantined)
        del self._entries[entry.grant.key]
        self._writers.discard(entry.grant.writer, entry.grant.key)

    def _count(self, refusal: Refusal) -> Refusal:
        self.counts.add(f"grant_refused_{refusal.reason.name.lower()}")
        return refusal
