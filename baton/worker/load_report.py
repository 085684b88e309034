"""How full a pool is, as a router hears it."""

from __future__ import annotations

from collections.abc import Mapping

from baton.cost import CostModel
from baton.v1 import worker_pb2 as wire
from kvtransfer.blocks.pool import BlockPool


def load_report(
    pool: BlockPool,
    *,
    waiting: int,
    running: int,
    waiting_tokens: int,
    resident_tokens: int,
    model: CostModel,
    chunk_tokens: int,
    pairs: Mapping[str, int] | None = None,
    granted_blocks: int = 0,
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
        cost=cost_to_wire(model, chunk_tokens),
        pairs=pairs,
        granted_blocks=granted_blocks,
    )


def cost_to_wire(model: CostModel, chunk_tokens: int) -> wire.StepCost | None:
    """None before anything was measured."""
    cost = model.cost
    if not (cost.knows_prefill or cost.knows_decode):
        return None
    return wire.StepCost(
        chunk=cost.chunk,
        per_token=cost.per_token,
        per_pair=cost.per_pair,
        step=cost.step,
        per_sequence=cost.per_sequence,
        per_resident=cost.per_resident,
        mixed=cost.mixed,
        error=model.error,
        chunk_tokens=chunk_tokens,
    )
