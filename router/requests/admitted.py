"""A request that is admitted, before any attempt at it."""

from __future__ import annotations

from dataclasses import dataclass

from baton.spec import RequestSpec
from kvtransfer.blocks.prefix import Digests
from router.placement.snapshot import Demand
from router.text.detokenisation import OutputText
from router.workers.served_model import ServedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Admitted:
    """What to generate, with which model, and how its text is made. Times in seconds on the event loop's clock.

    `digests` are those of the prompt's blocks. `refuses`: end it at once where its objectives can't be met.
    """

    spec: RequestSpec
    model: ServedModel
    text: OutputText
    demand: Demand
    digests: Digests
    arrived: float
    deadline: float
    handoff_wait_s: float
    refuses: bool = False

    def ttft_left_s(self, now: float) -> float | None:
        """Until the first token is due; None without such an objective."""
        limit = self.spec.objectives.ttft_ms
        return None if limit is None else limit / 1e3 - (now - self.arrived)

    @property
    def tpot_s(self) -> float | None:
        """The objective per token."""
        limit = self.spec.objectives.tpot_ms
        return None if limit is None else limit / 1e3
