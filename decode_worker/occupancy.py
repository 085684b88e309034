"""The sequences that have blocks on this worker, and whether one more may get some.

A sequence begins with room for what is known of it and a piece of its output, and takes further blocks as it writes.
It is let in when its likely length fits beside the likely lengths of those that are here, and a reserve for those that
go on for longer: so the pool seldom runs dry. Alone it always may: what could never fit an empty pool is refused.
"""

from __future__ import annotations

from collections.abc import Sequence

from baton.model import KvLayout
from baton.spec import AttemptKey, HandoffKey
from decode_worker.records import Pending, Resident
from kvtransfer.blocks.admission import Need
from kvtransfer.handoffs.grants import GrantLedger
from kvtransfer.handoffs.outcomes import GrantState

RESERVE_SHARE = 64
"""One block of so many is kept for sequences that become longer than was likely."""


class Occupancy:
    """`ledger` owns the blocks of all of them."""

    def __init__(self, ledger: GrantLedger, layout: KvLayout, max_sequences: int) -> None:
        self.ledger, self.layout, self.max_sequences = ledger, layout, max_sequences
        self.held: dict[AttemptKey, Resident] = {}
        """The sequences in the engine."""
        self.pending: dict[HandoffKey, Pending] = {}
        """Granted sequences, and those whose grant was given up and waits for proof."""
        self._reserve = max(1, ledger.pool.blocks // RESERVE_SHARE)

    @property
    def promised(self) -> int:
        """Blocks that the residents will likely take beyond those that they have, and the reserve; 0 without any."""
        if not self.held:
            return 0
        growth = (self._growth(resident.need, len(self.ledger.table(resident.key))) for resident in self.held.values())
        return self._reserve + sum(growth)

    def on_the_way(self) -> list[HandoffKey]:
        """Granted sequences that will be resident: each takes a slot, as a resident does. One that waits for proof
        takes blocks alone. O(pending)."""
        return [key for key in self.pending if self.ledger.state(key) is not GrantState.ABORTING]

    def has_slot(self, attempt: AttemptKey = b"") -> bool:
        """Whether one more sequence may run beside all others; `attempt` itself does not count."""
        others = sum(other.attempt != attempt for other in self.on_the_way())
        return len(self.held) + others < self.max_sequences

    def admits(self, need: Need, digests: Sequence[bytes]) -> bool:
        """Whether there is room for one more sequence, whose blocks of these digests may be found in the pool."""
        pool, arriving = self.ledger.pool, self.on_the_way()
        if not self.held and not arriving:
            return pool.cost(digests, self.layout.blocks_for(need.first)) <= pool.available
        growth = sum(self._growth(self.pending[key].need, len(self.ledger.table(key))) for key in arriving)
        taken = pool.cost(digests, self.layout.blocks_for(need.likely))
        return taken + growth + (self.promised or self._reserve) <= pool.available

    def _growth(self, need: Need, blocks: int) -> int:
        return max(0, self.layout.blocks_for(need.likely) - blocks)
