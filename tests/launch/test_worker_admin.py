"""What a worker says of itself."""

from __future__ import annotations

from baton.launch.worker_admin import Sizes, WorkerAdmin
from baton.spec import HandoffKey, ProcessRef
from baton.telemetry import Counts
from baton.v1.admin_pb2 import GetStatusRequest
from kvtransfer.blocks.pool import BlockPool
from kvtransfer.handoffs.grants import GrantLedger
from kvtransfer.handoffs.messages import Grant


async def test_status_tells_when_the_books_of_the_grants_do_not_add_up() -> None:
    """Where the pool's own still do."""
    pool = BlockPool(8)
    ledger = GrantLedger(pool)
    admin = WorkerAdmin(ProcessRef("d", "d-1", "here:1"), [], pool, Sizes(0, 0), dict, ledger.check_integrity, Counts())

    async def integrity() -> str:
        return (await admin.GetStatus(GetStatusRequest(), None)).pool.integrity_error

    grant = ledger.open(HandoffKey(b"a" * 16, 1), "writer", [], 2, 3, now=0.0)
    assert isinstance(grant, Grant)
    assert await integrity() == ""
    pool.release(grant.table[:1])
    pool.check_integrity()
    assert await integrity() == "a granted block is not held"
