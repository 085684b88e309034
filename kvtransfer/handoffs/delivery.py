"""The sender's side of an attempt's handoffs, on a prefill worker.

    AWAITING_GRANT ──granted──> DELIVERING ──all handed out, first token known──> COMMITTING ──committed──> RELEASED
          │                         │                                                  │
          └────────── refused, aborted by the receiver, a failed write, fail ──────────┘
                                    v
                                 FAILED ──rebind (a higher handoff number)──> AWAITING_GRANT

The caller owns the source blocks, and holds them until the handoff is over for good and no write of them is in flight.
A rebind starts over with the next receiver. A handoff that a receiver may know and that ends without Committed gets a
Closed, but only when none of its writes is under way: `Closed` is a promise.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from enum import Enum, auto

from baton.spec import HandoffKey
from kvtransfer.handoffs.messages import BlockMove, Ticket


class DeliveryState(Enum):
    AWAITING_GRANT = auto()
    DELIVERING = auto()
    COMMITTING = auto()
    RELEASED = auto()
    FAILED = auto()


class GrantAnswer(Enum):
    ACCEPTED = auto()
    DUPLICATE = auto()  # changed nothing
    STALE = auto()  # changed nothing; a Closed answers it where one is due (`take_closed`)
    INVALID = auto()  # does not fit this sequence: the handoff has failed


class Delivery:
    """One attempt's handoffs, one after another. Pure, without clock or I/O; not thread-safe.

    `source[i]` is the sender's block i of the sequence; `tokens` of `block_tokens` each fill them, the last perhaps
    in part. Batches that `take_moves` gives must each be reported by `written` or `write_failed`, exactly once.
    """

    def __init__(self, key: HandoffKey, source: Sequence[int], tokens: int, block_tokens: int) -> None:
        assert len(source) == -(-tokens // block_tokens), "the source blocks hold exactly the prompt"
        self.key, self.source = key, tuple(source)
        self.tokens, self.block_tokens = tokens, block_tokens
        self.state, self.reason = DeliveryState.AWAITING_GRANT, ""
        self._computed = 0
        self._first_token_known = False
        self.ticket: Ticket | None = None
        """The accepted grant's; None before it and after a failure."""
        self._next = 0  # the first index that was never handed out
        self._written = 0
        self._under_way: Counter[HandoffKey] = Counter()  # blocks in writes that have not returned
        self._to_close: set[HandoffKey] = set()

    @property
    def complete_blocks(self) -> int:
        """Leading source blocks whose content is final; a partial last one is once the prompt is complete."""
        return len(self.source) if self._computed >= self.tokens else self._computed // self.block_tokens

    @property
    def in_flight(self) -> int:
        """Blocks in writes that have not returned, earlier handoffs included."""
        return self._under_way.total()

    @property
    def delivered(self) -> bool:
        """Whether every block that the receiver lacked has been written to it."""
        return self.ticket is not None and self._written == len(self.ticket.writable)

    def computed(self, tokens: int) -> None:
        """The KV of the first `tokens` tokens is in the source blocks. Never decreases."""
        self._computed = max(self._computed, tokens)

    def first_token(self) -> None:
        """A commit can carry the first token from now on. The caller keeps it."""
        self._first_token_known = True

    def granted(self, ticket: Ticket) -> GrantAnswer:
        if ticket.key != self.key or self.state is not DeliveryState.AWAITING_GRANT:
            if self.ticket == ticket or (ticket.key == self.key and self.state is DeliveryState.RELEASED):
                return GrantAnswer.DUPLICATE
            if ticket.key != self.key or self.state is DeliveryState.FAILED:
                self._to_close.add(ticket.key)
            return GrantAnswer.STALE
        if len(ticket.blocks) != len(self.source):
            self._end(f"the grant has {len(ticket.blocks)} blocks for {len(self.source)}", close=True)
            return GrantAnswer.INVALID
        self.ticket = ticket
        self._next = ticket.cached_blocks
        self.state = DeliveryState.DELIVERING
        return GrantAnswer.ACCEPTED

    def refused(self, key: HandoffKey, reason: str) -> bool:
        """The receiver has no room, and holds nothing of this handoff. False when the message is late."""
        if key != self.key or self.state is not DeliveryState.AWAITING_GRANT:
            return False
        self._end(reason, close=False)
        return True

    def take_moves(self, limit: int) -> list[BlockMove]:
        """At most `limit` blocks that can be written now, in the order of the sequence; they count as under way."""
        if self.ticket is None or self.state is not DeliveryState.DELIVERING:
            return []
        indices = range(self._next, min(self.complete_blocks, self._next + limit))
        if not indices:
            return []
        self._next = indices.stop
        self._under_way[self.key] += len(indices)
        return [BlockMove(self.source[i], self.ticket.blocks[i], i) for i in indices]

    def written(self, key: HandoffKey, moves: Sequence[BlockMove]) -> None:
        if self._landed(key, moves):
            self._written += len(moves)

    def write_failed(self, key: HandoffKey, moves: Sequence[BlockMove], reason: str) -> None:
        """The transport has not placed all of this batch: the handoff has failed."""
        if self._landed(key, moves):
            self._end(reason, close=True)

    def take_commit(self) -> int | None:
        """The number of blocks that the Commit names, once: when all are handed to the transport and the first token is
        known. None before and after. The receiver waits for data that is still under way."""
        if self.state is not DeliveryState.DELIVERING or self.ticket is None or not self._first_token_known:
            return None
        if self._next < len(self.source):
            return None
        self.state = DeliveryState.COMMITTING
        return len(self.ticket.writable)

    def committed(self, key: HandoffKey) -> bool:
        """The sequence is resident. False when the message is late, or cannot be true."""
        if key != self.key or self.state is not DeliveryState.COMMITTING:
            return False
        self.state = DeliveryState.RELEASED
        return True

    def aborted(self, key: HandoffKey, reason: str) -> bool:
        """The receiver gave the handoff up, and waits for our Closed. False when the message is late."""
        if key != self.key:
            self._to_close.add(key)
            return False
        if self.state in (DeliveryState.FAILED, DeliveryState.RELEASED):
            self._to_close.add(key)  # the receiver asks again: our Closed was lost or is not due yet
        return self._end(reason, close=True)

    def fail(self, reason: str) -> bool:
        """False when the handoff is over already."""
        return self._end(reason, close=True)

    def rebind(self, key: HandoffKey) -> bool:
        """Start over with a higher handoff number. False when it is not higher or the sequence is resident."""
        assert key.attempt == self.key.attempt, "a rebind stays within its attempt"
        if key.handoff <= self.key.handoff or self.state is DeliveryState.RELEASED:
            return False
        self._end("bound anew", close=True)
        self.key, self.state, self.reason = key, DeliveryState.AWAITING_GRANT, ""
        return True

    def take_closed(self) -> list[HandoffKey]:
        """Handoffs whose Closed is due: over, without a write under way. Each once, and whenever the receiver asks."""
        ready = sorted((k for k in self._to_close if not self._under_way[k]), key=lambda k: k.handoff)
        self._to_close.difference_update(ready)
        return ready

    def _landed(self, key: HandoffKey, moves: Sequence[BlockMove]) -> bool:
        """Books a returned batch. Whether it belongs to the live handoff."""
        assert self._under_way[key] >= len(moves), "a batch was reported twice"
        self._under_way[key] -= len(moves)
        if not self._under_way[key]:
            del self._under_way[key]
        return key == self.key and self.state in (DeliveryState.DELIVERING, DeliveryState.COMMITTING)

    def _end(self, reason: str, close: bool) -> bool:
        if self.state in (DeliveryState.RELEASED, DeliveryState.FAILED):
            return False
        self.state, self.reason, self.ticket = DeliveryState.FAILED, reason, None
        self._next = self._written = 0
        if close:
            self._to_close.add(self.key)
        return True
