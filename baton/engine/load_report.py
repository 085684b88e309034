"""How full a pool is, as a router hears it."""

from __future__ import annotations

from baton.v1 import worker_pb2 as wire
from kvtransfer.pool import BlockPool


def load_report(
    pool: BlockPool, *, waiting: int, running: int, waiting_tokens: int, resident_tokens: int
) -> wire.LoadReport:
    """The pool's books, with what a role knows of its queue and its sequences."""
    statistics = pool.statistics()
    return wire.LoadReport(
        waiting=waiting,
        running=running,
        waiting_tokens=waiting_tokens,
        free_blocks=statistics.free,
        cached_blocks=statistics.cached,
        held_blocks=statistics.held,
        quarantined_blocks=statistics.quarantined,
        resident_tokens=resident_tokens,
    )
