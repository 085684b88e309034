"""What the decode role keeps of a sequence before and after it is resident."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from baton.rpc.worker_service import RouterSession
from baton.spec import HandoffKey, SequenceSpec, TokenLogprobs
from kvtransfer.handoff import Aborted


@dataclass(frozen=True, slots=True)
class FirstToken:
    """What a commit carries: the token that the prefill worker drew."""

    token: int
    logprobs: TokenLogprobs | None


@dataclass(frozen=True, slots=True)
class Pending:
    """A granted sequence until it is resident."""

    spec: SequenceSpec
    router: RouterSession
    transport: str
    writer: str


@dataclass(slots=True)
class Resident:
    """A sequence that decodes here. `tokens` mirrors the engine's, for the prefix index; times are monotonic."""

    key: HandoffKey
    spec: SequenceSpec
    router: RouterSession
    tokens: list[int]
    resident_at: float
    first_step_at: float | None = None
    ending: bool = field(default=False)
    failure: str = ""
    """Why it ends, where its own results could not be handled."""


class Writers(Protocol):
    """The control streams of the workers that hand over to this one, by incarnation."""

    def committed(self, writer: str, key: HandoffKey) -> None:
        """Tells the writer that the sequence is resident."""

    def aborted(self, writer: str, aborted: Aborted) -> None:
        """Tells the writer to stop writing and to answer with a close."""
