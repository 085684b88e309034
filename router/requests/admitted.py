"""A request before an attempt at it: what a placement needs to know."""

from __future__ import annotations

from dataclasses import dataclass, replace

from baton.spec import AttemptKey, RequestSpec, SequenceSpec
from baton.worker.prompt_queue import AGEING_S
from kvtransfer.blocks.admission import Need
from kvtransfer.blocks.prefix import Digests
from router.placement.snapshot import Demand
from router.text.detokenisation import OutputText
from router.workers.prefixes import digests_of
from router.workers.served_model import ServedModel


def demand_of(model: ServedModel, prompt: int, output: int, likely_tokens: int, max_tokens: int) -> Demand:
    """The room that a sequence of these lengths, in tokens, will likely need."""
    need, blocks_for = Need.of_lengths(prompt, output, likely_tokens, max_tokens), model.card.kv_layout.blocks_for
    return Demand(blocks_for(need.likely), need.known, blocks_for(need.most))


@dataclass(frozen=True, slots=True, kw_only=True)
class Admitted:
    """Times in seconds on the event loop's clock.

    `output` are the tokens of earlier attempts; `digests` are those of the known tokens' blocks; `likely_tokens` is how
    long the whole output will likely become. `refuses`: end it at once where its objectives can't be met. It was
    `preempted` so often.
    """

    spec: RequestSpec
    model: ServedModel
    text: OutputText
    demand: Demand
    digests: Digests
    likely_tokens: int
    arrived: float
    deadline: float
    refuses: bool = False
    output: tuple[int, ...] = ()
    preempted: int = 0

    @property
    def known(self) -> tuple[int, ...]:
        """Prompt, and output so far: what an attempt computes."""
        return (*self.spec.prompt, *self.output) if self.output else self.spec.prompt

    @property
    def tokens_left(self) -> int:
        """Output tokens that may still be drawn."""
        return self.spec.max_tokens - len(self.output)

    def again(self, output: tuple[int, ...], preempted: int) -> Admitted:
        """For another attempt, which goes on after `output`. What was admitted is not refused any more."""
        spec, model = self.spec, self.model
        likely = model.lengths.likely(spec.max_tokens)
        return replace(
            self,
            output=output,
            preempted=preempted,
            likely_tokens=likely,
            demand=demand_of(model, len(spec.prompt), len(output), likely, spec.max_tokens),
            digests=digests_of(model.card, (*spec.prompt, *output), spec.tenant_salt),
            refuses=False,
        )

    def sequence(self, attempt: AttemptKey, now: float) -> SequenceSpec:
        """As an attempt sends it to a worker."""
        return self.spec.attempted(
            attempt,
            self.output,
            max(self.deadline - now, 0.0),
            self.due_in_s(now),
            likely_tokens=self.likely_tokens,
            age_s=max(now - self.arrived, 0.0),
            preemptions=self.preempted,
        )

    def due_in_s(self, now: float) -> float | None:
        """When a worker's queue should let it start; None where the queue decides. Once a token has come it keeps its
        age, so that it does not wait behind what came later."""
        return AGEING_S - (now - self.arrived) if self.output else self.ttft_left_s(now)

    def ttft_left_s(self, now: float) -> float | None:
        """Until the first token is due; None without such an objective, and once it has come."""
        limit = self.spec.objectives.ttft_ms
        return None if limit is None or self.output else limit / 1e3 - (now - self.arrived)

    @property
    def tpot_s(self) -> float | None:
        limit = self.spec.objectives.tpot_ms
        return None if limit is None else limit / 1e3
