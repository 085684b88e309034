"""The receiver's ledger: a decode worker's grants, and which of their blocks a writer may still write.

    open ──> GRANTED ──landed──> RECEIVING ──committed and all landed──> RESIDENT ──release──> RELEASED
                │                    │
                └──── abort, expire, cancel, closed, a newer handoff
                                     v
                                 ABORTING ──proved, writer_gone──> RELEASED

An abort frees at once the blocks that no writer could write (cached prefix, growth). The others are in quarantine until
there is proof that no write comes: the writer's Closed where its word suffices (shm), the transport's `revoked`, or the
end of its process. Time proves nothing. Blocks enter the prefix index only when the sequence becomes RESIDENT.

Messages may be duplicated, late or reordered. A message about an unknown, finished or superseded handoff, or with
another generation, changes nothing and is counted.
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from baton.spec import AttemptKey, HandoffKey, RefusalReason
from baton.telemetry import Counts
from kvtransfer.blocks.pool import BlockPool
from kvtransfer.handoffs.leases import LeaseTable
from kvtransfer.handoffs.messages import WRITE_TOKEN_BYTES, Aborted, Grant, Refusal, Ticket
from kvtransfer.handoffs.outcomes import (
    CancelAnswer,
    GrantState,
    LedgerEntry,
    LedgerLimits,
    LedgerOutcome,
    LedgerStatistics,
    check_books,
)
from kvtransfer.handoffs.peers import AttemptMemory, Writers


class GrantLedger:
    """Pure: no clock, no I/O; `now` is monotonic seconds. Not thread-safe: the loop that owns the pool owns it.

    `on_abort` hears at once of each grant that is given up. `attempts` and `writers` are the memory of the peers.
    """

    def __init__(
        self,
        pool: BlockPool,
        limits: LedgerLimits | None = None,
        on_abort: Callable[[Aborted], None] | None = None,
        mint_token: Callable[[], bytes] = lambda: secrets.token_bytes(WRITE_TOKEN_BYTES),
        counts: Counts | None = None,
    ) -> None:
        self.pool, self.limits, self.counts = pool, limits or LedgerLimits(), counts or Counts()
        self._on_abort, self._mint_token, self._generation = on_abort, mint_token, 0
        self._entries: dict[HandoffKey, LedgerEntry] = {}
        self.attempts = AttemptMemory(self.limits.tombstone_s, self.limits.tombstones)
        self.writers = Writers(self.limits.lease_s, self.limits.tombstone_s)
        self._handoffs: LeaseTable[HandoffKey] = LeaseTable()

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
        """Reserve `total_blocks` to begin with; the prompt, of these `digests`, fills `prompt_blocks`. A duplicate gets
        the same answer. `writer` is an incarnation; `deadline` (monotonic seconds) bounds the time to be resident."""
        assert 1 <= prompt_blocks <= total_blocks, "a sequence is not shorter than its prompt"
        assert len(digests) <= prompt_blocks, "more digests than prompt blocks"
        if (known := self._entries.get(key)) is not None:
            return self._again(known, writer, now)
        if (refusal := self.attempts.verdict(key)) is not None:
            return self._count(refusal)
        seconds = self.limits.handoff_s if deadline is None else min(self.limits.handoff_s, deadline - now)
        if seconds <= 0:
            return self._count(Refusal(key, RefusalReason.EXPIRED, "the handoff's deadline has passed"))
        if self.writers.has_ended(writer):
            return self._count(Refusal(key, RefusalReason.EXPIRED, "the sender's process has ended"))
        older = self.attempts.latest(key.attempt)
        if older is not None and older in self._entries:
            if self.state(older) is GrantState.RESIDENT:
                return self._count(Refusal(key, RefusalReason.EXPIRED, f"resident already, by handoff {older.handoff}"))
            self.abort(older, RefusalReason.EXPIRED, now, f"handoff {key.handoff} takes its place")
        granted = self._reserve(key, writer, digests, prompt_blocks, total_blocks)
        if isinstance(granted, Refusal):
            self.attempts.ended(granted, now)
            return self._count(granted)
        self._handoffs.grant(key, now, seconds)
        self.attempts.opened(key)
        self.writers.add(writer, key)
        self.writers.heard(writer, now)
        return granted

    def landed(self, key: HandoffKey, generation: int, indices: Iterable[int]) -> LedgerOutcome:
        entry = self._current(key, generation, "landed")
        if isinstance(entry, LedgerOutcome):
            return entry
        arrived = set(indices)
        if any(entry.grant.ticket.destination(index) is None for index in arrived):
            self.counts.add("grant_landed_conflict")
            return LedgerOutcome.CONFLICT
        entry.missing -= arrived
        entry.state = GrantState.RECEIVING
        return self._settle(entry)

    def commit(self, key: HandoffKey, generation: int, blocks: int, payload: object) -> LedgerOutcome:
        """The sender wrote `blocks` blocks, or has them on the way. `payload` is the caller's; the first one stays."""
        entry = self._current(key, generation, "commit")
        if isinstance(entry, LedgerOutcome):
            return entry
        if blocks != len(entry.grant.ticket.writable):
            self.counts.add("grant_commit_conflict")
            return LedgerOutcome.CONFLICT
        if not entry.committed:
            entry.committed, entry.payload = True, payload
        return self._settle(entry)

    def abort(self, key: HandoffKey, reason: RefusalReason, now: float, message: str = "") -> bool:
        """Give a grant up. False, without a change, when it is unknown, resident or given up already."""
        entry = self._entries.get(key)
        if entry is None or entry.state in (GrantState.RESIDENT, GrantState.ABORTING):
            return False
        grant = entry.grant
        proven = self.writers.has_ended(grant.writer) or not grant.written
        entry.state, entry.payload = GrantState.ABORTING, None
        self._handoffs.drop(key)
        self.pool.release(grant.growth)
        self.pool.release(grant.cached)
        entry.quarantined = self.pool.quarantine(grant.written)
        text = message or f"handoff given up: {reason.name.lower()}"
        self.attempts.ended(Refusal(key, reason, text), now)
        self.counts.add(f"grant_abort_{reason.name.lower()}")
        if proven:
            self._free(entry)
        if self._on_abort is not None:
            self._on_abort(Aborted(grant, reason, text, proven))
        return True

    def closed(self, key: HandoffKey, now: float, proof: bool) -> bool:
        """The writer promises to write nothing more under this handoff. `proof`: its word suffices (shm); with tcp,
        `proved` follows when the transport has revoked. Returns whether a live grant was given up."""
        gave_up = self.abort(key, RefusalReason.CANCELLED, now, "the sender closed the handoff")
        if proof:
            self.proved(key)
        return gave_up

    def proved(self, key: HandoffKey) -> bool:
        """No more bytes of this handoff can arrive: ends its quarantine. False when it has none."""
        if self.state(key) is not GrantState.ABORTING:
            self.counts.add("grant_proof_late")
            return False
        self._free(self._entries[key])
        return True

    def writer_gone(self, incarnation: str, now: float) -> None:
        """The writer's process has ended: gives up its grants and ends their quarantine. Residents stay."""
        self.writers.end(incarnation, now)
        for key in self.writers.handoffs(incarnation):
            if not self.abort(key, RefusalReason.UNREACHABLE, now, "the sender's process has ended"):
                self.proved(key)

    def cancel(self, attempt: AttemptKey, now: float) -> CancelAnswer:
        """Give up the attempt's handoff and refuse any later one, also when the attempt is not known yet."""
        latest = self.attempts.latest(attempt)
        resident = self.grant(latest) if latest and self.state(latest) is GrantState.RESIDENT else None
        self.attempts.cancelled(attempt, now, live=resident is not None)
        aborted = latest is not None and self.abort(latest, RefusalReason.CANCELLED, now, "the attempt was cancelled")
        return CancelAnswer(aborted, resident)

    def expire(self, now: float) -> None:
        for writer in self.writers.expire(now):
            for key in self.writers.handoffs(writer):
                self.abort(key, RefusalReason.EXPIRED, now, "the sender's lease ran out")
        for key in self._handoffs.expire(now):
            self.abort(key, RefusalReason.EXPIRED, now, "the handoff took too long")
        self.attempts.expire(now)

    def release(self, key: HandoffKey, now: float, digests: Sequence[bytes] = ()) -> bool:
        """Give the blocks of a finished resident back. `digests`, for the next turn, are those of its complete blocks
        from the start, output included; such blocks stay CACHED. False when not resident."""
        if self.state(key) is not GrantState.RESIDENT:
            self.counts.add("grant_release_late")
            return False
        entry = self._entries.pop(key)
        self._index(entry.table, digests)
        self.pool.release(entry.table)
        self.attempts.ended(Refusal(key, RefusalReason.EXPIRED, "the sequence is finished"), now)
        return True

    def hold(self, key: HandoffKey, blocks: Sequence[int]) -> None:
        """Take over the blocks of a sequence that no peer writes: it is resident from the start."""
        assert key not in self._entries, "a sequence is held once"
        grant = Grant(Ticket(key, 0, bytes(WRITE_TOKEN_BYTES), tuple(blocks), len(blocks), ""), ())
        self._entries[key] = LedgerEntry(grant, (), set(), list(blocks), GrantState.RESIDENT)
        self.attempts.opened(key)

    def grow(self, key: HandoffKey, count: int) -> list[int] | None:
        """`count` more blocks for a resident, which are freed with its others; None, and no change, without room."""
        assert self.state(key) is GrantState.RESIDENT, "only a resident grows"
        fresh = self.pool.allocate(count)
        self._entries[key].table += fresh or ()
        return fresh

    def table(self, key: HandoffKey) -> list[int]:
        """The blocks of a resident in order of position."""
        return self._entries[key].table

    def state(self, key: HandoffKey) -> GrantState | None:
        """None when unknown or RELEASED."""
        entry = self._entries.get(key)
        return entry.state if entry else None

    def grant(self, key: HandoffKey) -> Grant | None:
        entry = self._entries.get(key)
        return entry.grant if entry else None

    def payload(self, key: HandoffKey) -> object:
        return self._entries[key].payload

    def statistics(self) -> LedgerStatistics:
        states = Counter(entry.state for entry in self._entries.values())
        return LedgerStatistics(
            **{state.name.lower(): states[state] for state in GrantState},
            quarantined_blocks=sum(len(entry.quarantined) for entry in self._entries.values()),
            writers=len(self.writers),
            tombstones=self.attempts.tombstones,
        )

    def check_integrity(self) -> None:
        check_books(self.pool, self._entries.values())

    def _again(self, entry: LedgerEntry, writer: str, now: float) -> Grant | Refusal:
        grant = entry.grant
        if entry.state is GrantState.ABORTING:
            ended = self.attempts.verdict(grant.key)
            return self._count(ended or Refusal(grant.key, RefusalReason.EXPIRED, "the handoff was given up"))
        if grant.writer != writer:
            return self._count(Refusal(grant.key, RefusalReason.EXPIRED, "the handoff belongs to another sender"))
        self.writers.heard(writer, now)
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
        self._entries[key] = LedgerEntry(grant, tuple(digests), set(grant.ticket.writable), list(grant.table))
        return grant

    def _current(self, key: HandoffKey, generation: int, what: str) -> LedgerEntry | LedgerOutcome:
        """The grant that a message is about, or the outcome where the message changes nothing."""
        entry = self._entries.get(key)
        if entry is None or entry.state is GrantState.ABORTING:
            self.counts.add(f"grant_{what}_late")
            return LedgerOutcome.IGNORED
        if entry.grant.generation != generation:
            self.counts.add(f"grant_{what}_wrong_generation")
            return LedgerOutcome.IGNORED
        return LedgerOutcome.ALREADY if entry.state is GrantState.RESIDENT else entry

    def _settle(self, entry: LedgerEntry) -> LedgerOutcome:
        if not entry.committed or entry.missing:
            return LedgerOutcome.PENDING
        entry.state = GrantState.RESIDENT
        self._handoffs.drop(entry.grant.key)
        self.writers.discard(entry.grant.writer, entry.grant.key)
        self._index(entry.grant.table, entry.digests)
        self.counts.add("grant_resident")
        return LedgerOutcome.RESIDENT

    def _index(self, table: Sequence[int], digests: Sequence[bytes]) -> None:
        for block, digest in zip(table, digests, strict=False):
            self.pool.insert(block, digest)

    def _free(self, entry: LedgerEntry) -> None:
        self.pool.unquarantine(entry.quarantined)
        del self._entries[entry.grant.key]
        self.writers.discard(entry.grant.writer, entry.grant.key)

    def _count(self, refusal: Refusal) -> Refusal:
        self.counts.add(f"grant_refused_{refusal.reason.name.lower()}")
        return refusal
