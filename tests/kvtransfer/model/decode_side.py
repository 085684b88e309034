"""The decode worker of the model: what `decode_worker.service` does around the real ledger, and its transport."""

from __future__ import annotations

from baton.spec import HandoffKey
from kvtransfer.handoffs.messages import Grant, Refusal
from kvtransfer.handoffs.outcomes import GrantState, LedgerOutcome
from tests.kvtransfer.model.state import HANDOFF_S, LEASE_S, TICK_S, Attempt, State, Violation


class DecodeSide(State):
    """Grants, receives, gives up and lets go."""

    def on_open(self, key: HandoffKey, writer: int) -> None:
        attempt = self.of(key)
        blocks = len(attempt.delivery.source)
        digests = self._digests(attempt, blocks - 1)
        total = blocks + attempt.growth
        if not self.may_grant(key):
            self.say("refused", key)
            return
        answer = self.ledger.open(key, f"w{writer}", digests, blocks, total, self.now)
        if isinstance(answer, Refusal):
            self.say("refused", key)
            return
        if self.ledger.state(key) is not GrantState.RESIDENT:
            self.pending[key] = writer
            self.admitted[key] = answer.ticket
        self.say("grant", key, answer.ticket)

    def on_commit(self, key: HandoffKey, generation: int, blocks: int) -> None:
        outcome = self.ledger.commit(key, generation, blocks, "token")
        self._settled(key, outcome)
        if outcome is LedgerOutcome.ALREADY:
            self.say("committed", key)
        elif outcome is LedgerOutcome.IGNORED and self.ledger.state(key) is not GrantState.ABORTING:
            self.say("refused", key)

    def on_close(self, key: HandoffKey) -> None:
        self.ledger.closed(key, self.now, proof=self.case.closes_prove and key in self.pending)
        self._check_freed(key)

    def on_cancel_there(self, key: HandoffKey) -> None:
        self.ledger.cancel(key.attempt, self.now)

    def may_grant(self, key: HandoffKey) -> bool:
        """What a resident waits for is not granted to others, else these could take it for ever."""
        return self.ledger.grant(key) is not None or not self.stalled

    def do_release(self, key: HandoffKey) -> None:
        self._check_table(key)
        self.ledger.release(key, self.now)

    def do_grow(self, key: HandoffKey) -> None:
        index = len(self.ledger.table(key))
        taken = self.ledger.grow(key, 1)
        if taken is None:
            self.stalled.add(key)
            return
        self.stalled.discard(key)
        self.content[taken[0]] = self._whole(self.of(key), index)

    def grow_stalled(self) -> None:
        """The oldest first."""
        for key in self.residents():
            if key in self.stalled:
                self.do_grow(key)

    def do_preempt(self, key: HandoffKey) -> None:
        """What it has computed stays in the cache, all but the block of its last token. Back again it must get further
        than it was, else it could be preempted for its own sake for ever."""
        self._check_table(key)
        blocks = len(self.ledger.table(key))
        self.waiting[key.attempt[0] - 1] = blocks + self.further(key)
        self.stalled.discard(key)
        self.ledger.release(key, self.now, self._digests(self.of(key), blocks - 1))

    def do_resume(self, number: int) -> None:
        attempt, blocks = self.attempts[number], self.waiting.pop(number)
        found = self.pool.match(self._digests(attempt, blocks - 1))
        fresh = self.pool.allocate(blocks - len(found))
        if fresh is None:
            raise Violation(f"attempt {number} is to go on without room")
        for index, block in enumerate(fresh, start=len(found)):
            self.content[block] = self._whole(attempt, index)
        self.ledger.hold(self.here(number), [*found, *fresh])

    def further(self, key: HandoffKey) -> int:
        return min(1, self.wants(key))

    def residents(self) -> list[HandoffKey]:
        """The oldest first."""
        return sorted(self.ledger_keys(GrantState.RESIDENT), key=lambda key: (key.attempt[0], key.handoff))

    def wants(self, key: HandoffKey) -> int:
        """Blocks that a resident has still to take."""
        attempt = self.of(key)
        return len(attempt.delivery.source) + attempt.growth + self.case.grows - len(self.ledger.table(key))

    def do_renew(self, writer: int) -> None:
        self.ledger.writers.renew(f"w{writer}", self.now)

    def do_tick(self) -> None:
        self.now += TICK_S
        self.ledger.expire(self.now)

    def do_pass(self) -> None:
        """Nothing else can happen, so time goes on."""
        self.now += LEASE_S + HANDOFF_S
        self.ledger.expire(self.now)

    def on_landed(self, key: HandoffKey, generation: int, index: int) -> None:
        self._settled(key, self.ledger.landed(key, generation, [index]))

    def on_revoked(self, key: HandoffKey) -> None:
        if self.ledger.state(key) is GrantState.ABORTING:
            self.ledger.proved(key)
            self._check_freed(key)

    def on_writer_gone(self, writer: int) -> None:
        self.ledger.writer_gone(f"w{writer}", self.now)
        for key in [key for key, owner in self.pending.items() if owner == writer]:
            self._check_freed(key)

    def _settled(self, key: HandoffKey, outcome: LedgerOutcome) -> None:
        if outcome is LedgerOutcome.RESIDENT:
            grant = self.ledger.grant(key)
            assert grant is not None
            self.check_content(grant)
            self.pending.pop(key)
            self.revoke(key)
            self.say("committed", key)
        elif outcome is LedgerOutcome.CONFLICT:
            raise Violation(f"{key}: a message contradicts the grant")

    def do_place(self, index: int) -> None:
        """The last bytes of a block arrive; the receiver says so if the ticket is good, and else refuses it."""
        write = self.wires.writes.pop(index)
        key, attempt = write.ticket.key, self.of(write.ticket.key)
        good = self.admitted.get(key) == write.ticket
        self.content[write.move.destination] = (attempt.family, write.move.index)
        if good:
            self.wires.events.append(("landed", key, write.ticket.generation, write.move.index))
        if write.orphan:
            return
        if good:
            attempt.delivery.written(key, [write.move])
        else:
            attempt.delivery.write_failed(key, [write.move], "revoked")

    def do_drain(self, index: int) -> None:
        """Nothing more comes of an orphan."""
        del self.wires.writes[index]

    def do_revoke(self, key: HandoffKey) -> None:
        """The receiving thread has seen the revocation; connections in the middle of a block are closed."""
        self.wires.revoking.remove(key)
        for write in [write for write in self.wires.writes if write.ticket.key == key]:
            self.wires.writes.remove(write)
            if not write.orphan:
                self.of(key).delivery.write_failed(key, [write.move], "closed")
        self.wires.events.append(("revoked", key))

    @staticmethod
    def _digests(attempt: Attempt, blocks: int) -> list[bytes]:
        """Of the first `blocks` blocks: a family's prompts are the same, outputs are not."""
        prompt = len(attempt.delivery.source)
        of_output = 128 + attempt.delivery.key.attempt[0]
        return [bytes([attempt.family if i < prompt else of_output, i]) * 8 for i in range(blocks)]

    @staticmethod
    def _whole(attempt: Attempt, index: int) -> tuple[object, int]:
        """What a block holds when it is complete."""
        is_prompt = index < len(attempt.delivery.source)
        return (attempt.family if is_prompt else attempt.delivery.key.attempt, index)

    def _check_table(self, key: HandoffKey) -> None:
        """No other has written into a resident's prompt, nor into what it has taken since."""
        attempt, prompt = self.of(key), len(self.of(key).delivery.source)
        for index, block in enumerate(self.ledger.table(key)):
            granted = prompt <= index < prompt + attempt.growth
            if not granted and self.content[block] != self._whole(attempt, index):
                raise Violation(f"{key}: block {block} holds {self.content[block]}")

    def check_content(self, grant: Grant) -> None:
        """A resident's prompt blocks hold what was sent, whole."""
        family = self.of(grant.key).family
        for index, block in enumerate(grant.ticket.blocks):
            if self.content[block] != (family, index):
                raise Violation(f"{grant.key}: block {block} holds {self.content[block]}")
