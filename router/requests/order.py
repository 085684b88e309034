"""What a request is made of and what it needs: its states, its order, and the port to the router around it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Protocol

from baton.spec import AttemptKey, HandoffKey, SequenceSpec
from router.placement.snapshot import Demand
from router.text.detokenisation import OutputText
from router.workers.worker import Worker

if TYPE_CHECKING:
    from router.requests.request import Request


class State(Enum):
    """See `router.requests.request`."""

    QUEUED = "queued"
    PREFILLING = "prefilling"
    HANDING_OFF = "handing off"
    DECODING = "decoding"
    FINISHED = "finished"
    FAILED = "failed"
    CANCELLED = "cancelled"


OVER = frozenset({State.FINISHED, State.FAILED, State.CANCELLED})


@dataclass(frozen=True, slots=True)
class Order:
    """A request that is admitted: what to generate, and how its text is made. Times on the event loop's clock."""

    spec: SequenceSpec
    text: OutputText
    demand: Demand
    arrived: float
    deadline: float
    handoff_wait_s: float
    refuses: bool = False
    """Refused where its objectives can't be met."""

    def ttft_left_s(self, now: float) -> float | None:
        """Until the first token is due; None without such an objective."""
        limit = self.spec.objectives.ttft_ms
        return None if limit is None else limit / 1e3 - (now - self.arrived)

    @property
    def tpot_s(self) -> float | None:
        """The objective per token."""
        limit = self.spec.objectives.tpot_ms
        return None if limit is None else limit / 1e3


@dataclass(frozen=True, slots=True)
class Choice:
    """A decode worker, and whether it seems to have room."""

    worker: Worker
    has_room: bool


class Port(Protocol):
    """What a request needs of the router around it. Nothing here waits or raises."""

    def choose_decode(self, request: Request, avoid: str) -> Choice | None:
        """The decode worker to bind, not one that the attempt excludes; None when there is none."""

    def send_prompt(
        self, worker: Worker, spec: SequenceSpec, deadline_s: float, ttft_left_s: float | None, direct: bool
    ) -> None:
        """Queues the prompt at the worker; `direct`: to be decoded there too."""

    def send_bind(self, worker: Worker, key: HandoffKey, decode: Worker) -> None:
        """Tells the prefill worker where the blocks go."""

    def send_cancel(self, workers: Iterable[Worker], attempt: AttemptKey, reason: str) -> None:
        """Makes the workers forget the attempt."""

    def closed(self, request: Request) -> None:
        """The request is over and wants no more messages."""
