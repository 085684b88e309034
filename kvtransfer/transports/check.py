"""What every transport checks about a write, on both sides."""

from __future__ import annotations

import hmac
from collections.abc import Sequence

from baton.errors import WriteRefused
from kvtransfer.handoffs.messages import Ticket
from kvtransfer.transports.base import BlockMove
from kvtransfer.transports.tcp.wire import Entry
from kvtransfer.transports.wire import Identity


def plan(ticket: Ticket, moves: Sequence[BlockMove], source_blocks: int) -> None:
    """The writer's own check, before anything is sent. Raises `WriteRefused` for a move that its ticket does not allow;
    a source block outside the writer's own pool is a fault of ours."""
    for move in moves:
        assert 0 <= move.source < source_blocks, f"source block {move.source} of {source_blocks}"
        if ticket.destination(move.index) != move.destination:
            raise WriteRefused(f"{ticket.key}: block {move.index} may not go to {move.destination}")


def refusal(admitted: Ticket | None, ticket: Ticket, moves: Sequence[BlockMove], writer: str) -> str | None:
    """Why the receiver does not take this write; None when it does."""
    why = identity_refusal(admitted, ticket.generation, ticket.write_token)
    if why is not None or admitted is None:
        return why
    if admitted.writer != writer:
        return "the ticket belongs to another process"
    for move in moves:
        if admitted.destination(move.index) != move.destination:
            return f"block {move.index} may not go to {move.destination}"
    return None


def entries_refusal(admitted: Ticket | None, identity: Identity, entries: Sequence[Entry]) -> str | None:
    """Why the receiver does not take a batch of `entries` under this identity; None when it does."""
    why = identity_refusal(admitted, identity.generation, identity.write_token)
    if why is not None or admitted is None:
        return why
    wrong = next((e for e in entries if admitted.destination(e.index) != e.destination), None)
    return None if wrong is None else f"block {wrong.index} may not go to {wrong.destination}"


def identity_refusal(admitted: Ticket | None, generation: int, write_token: bytes) -> str | None:
    """The part that comes first, and that a stranger could have made up."""
    if admitted is None:
        return "no such grant"
    if admitted.generation != generation:
        return f"generation {generation}, the grant is of {admitted.generation}"
    if not hmac.compare_digest(admitted.write_token, write_token):
        return "wrong write token"
    return None
