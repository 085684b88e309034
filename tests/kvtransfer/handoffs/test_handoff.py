"""Sender and receiver together, in one process, and what the package may import."""

from __future__ import annotations

import subprocess
import sys

import pytest

from baton.spec import HandoffKey
from kvtransfer.blocks.pool import BlockPool
from kvtransfer.handoffs.delivery import Delivery
from kvtransfer.handoffs.grants import GrantLedger
from kvtransfer.handoffs.messages import Grant, Ticket
from kvtransfer.handoffs.outcomes import LedgerOutcome
from kvtransfer.transports.reactor import Reactor


def test_a_handoff_from_open_to_release() -> None:
    pool = BlockPool(32)
    ledger = GrantLedger(pool)
    key = HandoffKey(bytes(16), 1)
    delivery = Delivery(key, range(5), tokens=70, block_tokens=16)
    grant = ledger.open(key, "w", [bytes([n]) * 16 for n in range(4)], 5, 9, 0.0)
    assert isinstance(grant, Grant)
    delivery.granted(grant.ticket)
    outcome = LedgerOutcome.PENDING
    for computed in (32, 64, 70):
        delivery.computed(computed)
        moves = delivery.take_moves(100)
        outcome = ledger.landed(key, grant.generation, [move.index for move in moves])
        delivery.written(key, moves)
    assert outcome is LedgerOutcome.PENDING
    delivery.first_token()
    blocks = delivery.take_commit()
    assert blocks is not None
    assert ledger.commit(key, grant.generation, blocks, "token") is LedgerOutcome.RESIDENT
    assert delivery.committed(key)
    assert delivery.in_flight == 0
    ledger.release(key, 1.0)
    assert pool.statistics().cached == 4
    ledger.check_integrity()


def test_a_ticket_checks_itself_and_hides_its_token() -> None:
    key = HandoffKey(bytes(16), 1)
    with pytest.raises(ValueError, match="write_token"):
        Ticket(key, 1, b"short", (1,), 0, "w")
    with pytest.raises(ValueError, match="cached_blocks"):
        Ticket(key, 1, bytes(16), (1,), 2, "w")
    assert "token" not in repr(Ticket(key, 1, b"secret-token-123", (1,), 0, "w"))


def test_the_reactor_survives_a_callback_that_fails(caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> None:
        raise RuntimeError("a fault of ours")

    reactor = Reactor("test")
    ran: list[int] = []
    reactor.call(fail)
    reactor.call(lambda: ran.append(1))
    reactor.close(lambda: ran.append(2))
    reactor.close(lambda: ran.append(3))
    assert ran == [1, 2]
    assert not reactor.call(lambda: None)
    assert "callback failed" in caplog.text


def test_the_package_needs_no_torch_grpc_or_protobuf() -> None:
    code = (
        "import sys, pkgutil, importlib, kvtransfer\n"
        "for m in pkgutil.walk_packages(kvtransfer.__path__, 'kvtransfer.'): importlib.import_module(m.name)\n"
        "print([m for m in ('torch', 'grpc', 'google.protobuf') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert result.stdout.strip() == "[]"
