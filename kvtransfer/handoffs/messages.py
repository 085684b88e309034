"""The messages between the two sides of a handoff, as plain values; the workers translate to and from protobuf."""

from __future__ import annotations

from dataclasses import dataclass, field

from baton.spec import HandoffKey, RefusalReason

WRITE_TOKEN_BYTES = 16


@dataclass(frozen=True, slots=True)
class Ticket:
    """The right of one writer (an incarnation) to write one grant's blocks. Block `index` of the sequence goes to
    `blocks[index]`. The receiver has the first `cached_blocks` already; they must not be written."""

    key: HandoffKey
    generation: int
    write_token: bytes = field(repr=False)
    blocks: tuple[int, ...]
    cached_blocks: int
    writer: str

    def __post_init__(self) -> None:
        if len(self.write_token) != WRITE_TOKEN_BYTES:
            raise ValueError(f"write_token has {len(self.write_token)} bytes, not {WRITE_TOKEN_BYTES}")
        if not 0 <= self.cached_blocks <= len(self.blocks):
            raise ValueError(f"cached_blocks is {self.cached_blocks} of {len(self.blocks)} blocks")

    @property
    def writable(self) -> range:
        return range(self.cached_blocks, len(self.blocks))

    def destination(self, index: int) -> int | None:
        """None where this ticket allows no write."""
        return self.blocks[index] if index in self.writable else None


@dataclass(frozen=True, slots=True)
class BlockMove:
    """One block to write: `source` in the writer's pool, `destination` in the receiver's, `index` in the sequence."""

    source: int
    destination: int
    index: int


@dataclass(frozen=True, slots=True)
class Grant:
    """Room for a sequence on the receiver: its prompt's blocks, and `growth` for the first of its output."""

    ticket: Ticket
    growth: tuple[int, ...]

    @property
    def key(self) -> HandoffKey:
        return self.ticket.key

    @property
    def generation(self) -> int:
        return self.ticket.generation

    @property
    def writer(self) -> str:
        return self.ticket.writer

    @property
    def table(self) -> tuple[int, ...]:
        """The sequence's block table, growth included."""
        return self.ticket.blocks + self.growth

    @property
    def cached(self) -> tuple[int, ...]:
        """The leading blocks that the receiver had already: pinned, never written, never quarantined."""
        return self.ticket.blocks[: self.ticket.cached_blocks]

    @property
    def written(self) -> tuple[int, ...]:
        return self.ticket.blocks[self.ticket.cached_blocks :]


@dataclass(frozen=True, slots=True)
class WaitNotice:
    """The answer to an Open for which there is no room yet: `ahead` sequences go first, which takes about so long."""

    key: HandoffKey
    ahead: int
    expected_s: float


@dataclass(frozen=True, slots=True)
class Refusal:
    """The answer to an Open that gets no room. `retry_after_s` is set only where trying again can help."""

    key: HandoffKey
    reason: RefusalReason
    message: str
    retry_after_s: float | None = None


@dataclass(frozen=True, slots=True)
class Aborted:
    """A grant that the receiver gave up. The worker tells the writer, and asks the transport to revoke the ticket.
    `proven`: no write can come any more, so that no quarantine was needed."""

    grant: Grant
    reason: RefusalReason
    message: str
    proven: bool
