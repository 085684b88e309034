"""From live workers to a snapshot, and from a plan to a worker: what placement needs of the router around it.

Predicting takes some microseconds for each worker, so the few with the least to do are looked at first. Only where none
of these will do, many are: nobody is refused because the right worker was not looked at, among up to `SECOND_LOOK`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence, Set

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
        prefills, decodes = workers.get("prefill", []), workers["decode"]
        now = asyncio.get_running_loop().time()
        blocks = model.card.kv_layout.blocks_for(len(order.spec.prompt))
        able: Sequence[Worker] = prefills
        if prefills and blocks > model.least_blocks("prefill"):
            able = [worker for worker in prefills if worker.registration.blocks >= blocks]
        found, seen = self._plan(order, now, able, decodes, blocks, cached)
        if found is None:
            kind = "decode" if self._path == "direct" else "prefill"
            raise ResourceExhausted(f"no {kind} worker's pool has {blocks} blocks", constraint=f"{kind}_blocks")
        unseen = len(prefills) + len(decodes) - len(found.candidates)
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
        workers = model.reachable("decode")
        now = asyncio.get_running_loop().time()
        able: Sequence[Worker] = workers
        excluded: set[str] = set()
        if refused_by or avoid:
            excluded = {worker.name for worker in workers if worker.process.incarnation in refused_by}
            able = [worker for worker in workers if worker.name != avoid and worker.name not in excluded] or workers
        for width in (FIRST_LOOK, SECOND_LOOK):
            some = _freest(able, cached, width)
            loads = [worker.decode_load(now, cached.get(worker, 0)) for worker in some]
            decision = pick_decode(loads, order.demand, excluded, avoid, order.tpot_s)
            if len(able) <= width or (decision is not None and decision.keeps):
                break
        if decision is None:
            return None
        unseen = len(workers) - len(decision.candidates)
        self.explanations.decode(order.spec.tenant_salt, order.spec.request_id, decision, now, unseen)
        room = any(candidate.name == decision.chosen and candidate.feasible for candidate in decision.candidates)
        return Choice(next(worker for worker in some if worker.name == decision.chosen), room)

    def _plan(
        self,
        order: Order,
        now: float,
        prefills: Sequence[Worker],
        decodes: Sequence[Worker],
        blocks: int,
        cached: Mapping[Worker, int],
    ) -> tuple[Plan | None, dict[str, Worker]]:
        """Of few workers where that will do, else of many; and those that were looked at, by name."""
        ask = self._ask(order, now, len(decodes))
        for width in (FIRST_LOOK, SECOND_LOOK):
            some, others = _soonest(prefills, cached, width), _freest(decodes, cached, width)
            found = plan(
                ask,
                [worker.prefill_load(now, cached.get(worker, 0)) for worker in some],
                [worker.decode_load(now, cached.get(worker, 0)) for worker in others],
                blocks,
                direct=self._path != "disaggregated",
            )
            if (found is not None and found.meets) or max(len(prefills), len(decodes)) <= width:
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
            spec.max_tokens - len(spec.output) == 1,
        )


def _soonest(workers: Sequence[Worker], cached: Mapping[Worker, int], count: int) -> Sequence[Worker]:
    """Prefill workers with the least work before them, what the caches save taken off."""
    if len(workers) <= count:
        return workers

    keys = [
        ((ledger := worker.prefill).work_s, ledger.queued_tokens, worker.chosen_at, place)
        for place, worker in enumerate(workers)
    ]
    for place, saved in _cached_at(workers, cached):
        seconds, tokens, chosen_at, _ = keys[place]
        cost = workers[place].cost
        less_s = saved * cost.per_token if cost is not None else 0.0
        keys[place] = seconds - less_s, tokens - saved, chosen_at, place
    return _least(workers, keys, count)


def _freest(workers: Sequence[Worker], cached: Mapping[Worker, int], count: int) -> Sequence[Worker]:
    """Decode workers that carry the least."""
    if len(workers) <= count:
        return workers

    keys = [
        (worker.decode.tokens / worker.registration.blocks, worker.chosen_at, place)
        for place, worker in enumerate(workers)
    ]
    for place, saved in _cached_at(workers, cached):
        load, chosen_at, _ = keys[place]
        keys[place] = load - saved / workers[place].registration.blocks, chosen_at, place
    return _least(workers, keys, count)


def _cached_at(workers: Sequence[Worker], cached: Mapping[Worker, int]) -> list[tuple[int, int]]:
    """Places of the workers that hold some of the prompt, and how many tokens of it."""
    return [(place, cached[worker]) for place, worker in enumerate(workers) if worker in cached] if cached else []


def _least(workers: Sequence[Worker], keys: Sequence[tuple[*tuple[float, ...], int]], count: int) -> list[Worker]:
    """Those with the least keys, of which the last part is a worker's place."""
    return [workers[key[-1]] for key in sorted(keys)[:count]]


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
