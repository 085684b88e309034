"""From live workers to a snapshot, and from a plan to a worker: what placement needs of the router around it.

Predicting takes some microseconds for each worker, so the few with the least to do are looked at first. Only where none
of these will do, many are: nobody is refused because the right worker was not looked at, among up to `SECOND_LOOK`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Set

from baton.config import PathChoice, RoleName
from baton.errors import ResourceExhausted, Unavailable
from baton.spec import AttemptKey
from router.explanations import Explanations
from router.order import Choice, Order
from router.placement import Plan, pick_decode, plan
from router.registry import NOBODY_RETRY_S, ServedModel
from router.snapshot import Ask
from router.worker import Worker

FIRST_LOOK, SECOND_LOOK = 2, 64
"""Workers of each role that a decision looks at."""


class Placer:
    """Plans requests and binds them. `path` fixes the way; adaptive lets each request have its own."""

    def __init__(self, path: PathChoice) -> None:
        self._path = path
        self._unbound: dict[AttemptKey, int] = {}
        self._unbound_tokens = 0
        self.explanations = Explanations()

    @property
    def unbound(self) -> int:
        """Requests that are placed but that no decode worker has yet."""
        return len(self._unbound)

    @property
    def roles(self) -> tuple[RoleName, ...]:
        """Without workers of these nothing can be served."""
        return ("decode",) if self._path == "direct" else ("prefill", "decode")

    def place(self, order: Order, model: ServedModel, cached: Mapping[Worker, int]) -> tuple[Worker, Plan]:
        """The worker that computes the prompt; `cached` are tokens of it that workers hold already.

        Raises Unavailable without workers; ResourceExhausted without a pool that is large enough, or where the
        objectives can't be met and the request wants to be refused then.
        """
        workers = {role: model.usable(role) for role in self.roles}
        for role, there in workers.items():
            if not there:
                raise Unavailable(f"no {role} worker of {model.card.name} is there", NOBODY_RETRY_S, f"{role}_workers")
        now = asyncio.get_running_loop().time()
        blocks = model.card.kv_layout.blocks_for(len(order.spec.prompt))
        found, seen = self._plan(order, now, model, blocks, cached)
        if found is None:
            kind = "decode" if self._path == "direct" else "prefill"
            raise ResourceExhausted(f"no {kind} worker's pool has {blocks} blocks", constraint=f"{kind}_blocks")
        unseen = sum(map(len, workers.values())) - len(found.candidates)
        self.explanations.prompt(order.spec.tenant_salt, order.spec.request_id, found, now, unseen)
        if order.refuses and not found.meets:
            raise ResourceExhausted(_refusal(order, found), found.retry_s, found.constraint)
        chosen = seen[found.chosen]
        chosen.chosen_at = now
        return chosen, found

    def placed(self, attempt: AttemptKey, tokens: int) -> None:
        """It needs a decode worker, later."""
        self._unbound[attempt] = tokens
        self._unbound_tokens += tokens

    def settled(self, attempt: AttemptKey) -> None:
        """It has one, or needs none any more. Idempotent."""
        self._unbound_tokens -= self._unbound.pop(attempt, 0)

    def choose_decode(
        self, model: ServedModel, order: Order, cached: Mapping[Worker, int], refused_by: Set[str], avoid: str
    ) -> Choice | None:
        """The decode worker to bind; `cached` are tokens of the prompt that workers hold already, `refused_by`
        incarnations that won't take it. None when nobody is left."""
        workers, now = model.ranking("decode"), asyncio.get_running_loop().time()

        def may(worker: Worker) -> bool:
            return worker.name != avoid and worker.process.incarnation not in refused_by

        for width in (FIRST_LOOK, SECOND_LOOK):
            some = workers.least(width, cached, may if refused_by or avoid else None) or workers.least(width, cached)
            excluded = {worker.name for worker in some if worker.process.incarnation in refused_by}
            loads = [worker.decode_load(now, cached.get(worker, 0)) for worker in some]
            decision = pick_decode(loads, order.demand, excluded, avoid, order.tpot_s)
            if len(workers) <= width or (decision is not None and decision.keeps):
                break
        if decision is None:
            return None
        unseen = len(workers) - len(decision.candidates)
        self.explanations.decode(order.spec.tenant_salt, order.spec.request_id, decision, now, unseen)
        room = any(candidate.name == decision.chosen and candidate.feasible for candidate in decision.candidates)
        return Choice(next(worker for worker in some if worker.name == decision.chosen), room)

    def _plan(
        self, order: Order, now: float, model: ServedModel, blocks: int, cached: Mapping[Worker, int]
    ) -> tuple[Plan | None, dict[str, Worker]]:
        """Of few workers where that will do, else of many; and those that were looked at, by name."""
        rankings = {role: model.ranking(role) for role in self.roles}
        ask = self._ask(order, now, len(rankings["decode"]))
        for width in (FIRST_LOOK, SECOND_LOOK):
            some = []
            if "prefill" in rankings:
                some = rankings["prefill"].least(width, cached, lambda worker: worker.registration.blocks >= blocks)
            others = rankings["decode"].least(width, cached)
            found = plan(
                ask,
                [worker.prefill_load(now, cached.get(worker, 0)) for worker in some],
                [worker.decode_load(now, cached.get(worker, 0)) for worker in others],
                blocks,
                direct=self._path != "disaggregated",
            )
            if (found is not None and found.meets) or max(map(len, rankings.values())) <= width:
                break
        return found, {worker.name: worker for worker in (*some, *others)}

    def _ask(self, order: Order, now: float, decodes: int) -> Ask:
        spec = order.spec
        share = max(decodes, 1)
        return Ask(
            now,
            len(spec.prompt),
            order.demand,
            order.ttft_left_s(now),
            order.tpot_s,
            spec.priority,
            len(self._unbound) // share,
            self._unbound_tokens // share,
            spec.max_tokens - len(spec.output) - 1,
        )


def _refusal(order: Order, found: Plan) -> str:
    asked, spec = [], order.spec.objectives
    if spec.ttft_ms is not None:
        asked.append(f"ttft {spec.ttft_ms:g} ms")
    if spec.tpot_ms is not None:
        asked.append(f"tpot {spec.tpot_ms:g} ms")
    times = [
        f"{name} {seconds * 1e3:.0f} ms"
        for name, seconds in (("ttft", found.ttft_s), ("tpot", found.tpot_s))
        if seconds is not None
    ]
    what = "others' objectives" if found.constraint == "others" else f"its objective for {found.constraint}"
    return f"{what} can't be kept now: asked {' and '.join(asked) or 'nothing'}, expected {' and '.join(times)}"
