"""From live workers to a snapshot, and from a plan back to a worker.

Predicting takes some microseconds a worker, so the `FIRST_LOOK` least-loaded workers of each role are considered first,
and up to `SECOND_LOOK` where none of those meets the objectives.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence, Set
from typing import NamedTuple

from baton.config import PathChoice, RoleName, RouterConfig
from baton.errors import ResourceExhausted
from baton.rpc import awake
from baton.spec import AttemptKey
from baton.telemetry import Counts
from router.placement.explanations import Explanations
from router.placement.policy import Plan, pick_decode, plan
from router.placement.snapshot import Ask
from router.requests.admitted import Admitted
from router.workers.pools import roles_of, workers_for
from router.workers.prefixes import Prefixes
from router.workers.served_model import ServedModel
from router.workers.worker import Worker

FIRST_LOOK, SECOND_LOOK = 2, 64
"""Workers of each role that a decision considers."""
COMPUTE_PROMPTS: dict[PathChoice, tuple[RoleName, ...]] = {
    "adaptive": ("prefill", "decode"), "disaggregated": ("prefill",), "direct": ("decode",)
}  # fmt: skip
PROBE_S, PROBE_MOST = 10.0, 3.0
"""After PROBE_S without a first token, stop trusting an idle worker's prediction and admit one request whose objective
it misses by at most the factor PROBE_MOST: predictions are learned from served requests, so a slow minute would have
the worker refuse for ever."""


class Back(NamedTuple):
    """The decode worker on which a sequence was preempted, and how many of its tokens have their KV there."""

    worker: Worker
    cached_tokens: int


class Placer:
    """Plans requests and binds them. `path` fixes the way; with adaptive, each request has its own."""

    def __init__(
        self,
        path: PathChoice,
        prefixes: Prefixes,
        counts: Counts,
        clock: Callable[[], float] | None = None,
        explained: int = RouterConfig.explained_requests,
    ) -> None:
        """`clock` in seconds, which misses nothing; the running event loop's by default. The decisions about the last
        `explained` requests are kept."""
        self.prefixes = prefixes
        self.path, self._counts = path, counts
        self.clock = clock or (lambda: asyncio.get_running_loop().time())
        self.missed: Callable[[], float] = (lambda: 0.0) if clock else (lambda: awake.clock().missed)
        """Seconds that this process was away so far."""
        self._unbound: dict[AttemptKey, tuple[str, int]] = {}  # -> model, tokens
        self._on_the_way: dict[str, tuple[int, int]] = {}  # by model, how many these are, and their tokens
        self.explanations = Explanations(explained)

    @property
    def unbound(self) -> int:
        """Attempts that are placed and not bound to a decode worker yet."""
        return len(self._unbound)

    def place_again(self, request: Admitted, back_at: Back | None) -> tuple[Worker, Plan]:
        """For another attempt. One that was preempted goes back in place while most of its KV lies there, whatever the
        path setting is. Raises as `place`."""
        if back_at is not None and back_at.worker.usable and 2 * back_at.cached_tokens >= len(request.known):
            now, worker = self.clock(), back_at.worker
            load = worker.decode_load(now, min(back_at.cached_tokens, len(request.known) - 1))
            found = plan(self._ask(request, now, 1), (), [load], 0)
            if found is not None:
                found = found._replace(reason="back in place: most of its KV lies there")
                self.explanations.again(request.spec.tenant_salt, request.spec.request_id, found, now)
                return worker, found
        return self.place(request)

    def place(self, request: Admitted) -> tuple[Worker, Plan]:
        """The worker that computes the prompt.

        Raises Unavailable without the workers that it needs; ResourceExhausted without a pool that is large enough, or
        where the objectives can't be met and the request refuses that.
        """
        model, cached = request.model, self._cached(request)
        workers = workers_for(self.path, model, single_token=request.tokens_left == 1)
        now = self.clock()
        blocks = model.card.kv_layout.blocks_for(len(request.known))
        needed: dict[RoleName, int] = {"prefill": blocks, "decode": request.demand.at_most}
        found, seen = self._plan(request, now, needed, cached)
        if found is None:
            raise _too_large(needed, workers)
        degraded = not workers.get("prefill", True)
        if degraded:
            found = found._replace(reason=f"{found.reason}; no prefill worker is there")
        chosen, refused = seen[found.chosen], request.refuses and not found.meets
        if refused and _may_probe(chosen, found, now):
            chosen.probed_at, refused = now, False
            chosen.accuracy.forget()
            found = found._replace(reason=f"{found.reason}; let in to see whether that is still so")
            self._counts.add("probes")
        unseen = sum(len(workers[role]) for role in COMPUTE_PROMPTS[self.path]) - len(found.candidates)
        label = request.spec.tenant_salt, request.spec.request_id
        if request.output or request.preempted:
            self.explanations.again(*label, found, now, unseen)
        else:
            self.explanations.prompt(*label, found, now, unseen, refused)
        if refused:
            self._counts.add(f"refused_{found.constraint}")
            raise ResourceExhausted(_refusal(request, found), found.retry_s, found.constraint)
        if degraded:
            self._counts.add("placed_degraded")
        if found.ttft_s is None:
            self._counts.add("placed_unpredicted")
        if not found.meets:
            self._counts.add(f"placed_missing_{found.constraint}")
        chosen.chosen_at = now
        return chosen, found

    def placed(self, model: ServedModel, attempt: AttemptKey, tokens: int) -> None:
        """The attempt will need a decode worker."""
        self._unbound[attempt] = model.card.name, tokens
        self._count(model.card.name, 1, tokens)

    def settled(self, attempt: AttemptKey) -> None:
        """The attempt is bound to one, or over. Idempotent."""
        name, tokens = self._unbound.pop(attempt, ("", 0))
        if name:
            self._count(name, -1, -tokens)

    def choose_decode(self, request: Admitted, refused_by: Set[str], avoid: str) -> tuple[Worker, bool] | None:
        """The decode worker to bind, and whether it seems to have room. No incarnation in `refused_by`, and not the
        worker named `avoid` if there is another. None when no worker is left."""
        workers, now = request.model.ranking("decode"), self.clock()
        cached = self._cached(request) if len(workers) > 1 else {}

        def fits(worker: Worker) -> bool:
            return worker.registration.blocks >= request.demand.at_most

        def may(worker: Worker) -> bool:
            return fits(worker) and worker.name != avoid and worker.process.incarnation not in refused_by

        for width in (FIRST_LOOK, SECOND_LOOK):
            some = workers.least(width, cached, may) or workers.least(width, cached, fits)
            excluded = {worker.name for worker in some if worker.process.incarnation in refused_by}
            loads = [worker.decode_load(now, cached.get(worker, 0)) for worker in some]
            decision = pick_decode(loads, request.demand, excluded, avoid, request.tpot_s)
            if len(workers) <= width or (decision is not None and decision.keeps):
                break
        if decision is None:
            return None
        unseen = len(workers) - len(decision.candidates)
        self.explanations.decode(request.spec.tenant_salt, request.spec.request_id, decision, now, unseen)
        room = any(candidate.name == decision.chosen and candidate.feasible for candidate in decision.candidates)
        return next(worker for worker in some if worker.name == decision.chosen), room

    def _count(self, model: str, sequences: int, tokens: int) -> None:
        before = self._on_the_way.pop(model, (0, 0))
        if before[0] + sequences:
            self._on_the_way[model] = before[0] + sequences, before[1] + tokens

    def _cached(self, request: Admitted) -> dict[Worker, int]:
        """Tokens of the prompt that each worker holds already."""
        return self.prefixes.cached_tokens(request.model.card, len(request.known), request.digests)

    def _plan(
        self, request: Admitted, now: float, needed: Mapping[RoleName, int], cached: Mapping[Worker, int]
    ) -> tuple[Plan | None, dict[str, Worker]]:
        """The plan, and the workers that were considered, by name. `needed` is the least pool, in blocks, by role."""
        rankings = {role: request.model.ranking(role) for role in roles_of(self.path)}
        ask = self._ask(request, now, len(rankings["decode"]))

        def least(role: RoleName, count: int) -> list[Worker]:
            if role not in rankings:
                return []
            return rankings[role].least(count, cached, lambda worker: worker.registration.blocks >= needed[role])

        for width in (FIRST_LOOK, SECOND_LOOK):
            some, others = least("prefill", width), least("decode", width)
            prefills = [worker.prefill_load(now, cached.get(worker, 0)) for worker in some]
            decodes = [worker.decode_load(now, cached.get(worker, 0)) for worker in others]
            found = plan(ask, prefills, decodes, needed["prefill"], direct=self.path != "disaggregated")
            if (found is not None and found.meets) or max(map(len, rankings.values())) <= width:
                break
        return found, {worker.name: worker for worker in (*some, *others)}

    def _ask(self, request: Admitted, now: float, decodes: int) -> Ask:
        spec, share = request.spec, max(decodes, 1)
        waiting, tokens = self._on_the_way.get(request.model.card.name, (0, 0))
        objectives, unbound = (request.ttft_left_s(now), request.tpot_s), (waiting / share, tokens / share)
        tokens, gaps = len(request.known), request.tokens_left - 1
        return Ask(now, tokens, request.demand, *objectives, spec.priority, *unbound, gaps)


def _may_probe(worker: Worker, found: Plan, now: float) -> bool:
    """Whether an idle worker's measurements are too old to trust, and the request misses its objective by little."""
    if found.constraint not in ("ttft", "tpot") or len(worker.prefill) or len(worker.decode):
        return False
    if worker.probed_at is None:
        worker.probed_at = now  # its measurements from its start are fresh
    miss = next(offer.miss for offer in found.candidates if offer.name == found.chosen and offer.way is found.way)
    return miss <= PROBE_MOST and now - max(worker.accuracy.observed_at, worker.probed_at) >= PROBE_S


def _too_large(needed: Mapping[RoleName, int], workers: Mapping[RoleName, Sequence[Worker]]) -> ResourceExhausted:
    for role, there in workers.items():
        if there and all(worker.registration.blocks < needed[role] for worker in there):
            return ResourceExhausted(f"no {role} worker's pool has {needed[role]} blocks", constraint=f"{role}_blocks")
    return ResourceExhausted("no worker that was looked at can take it", constraint="decode_blocks")


def _refusal(request: Admitted, found: Plan) -> str:
    if found.constraint == "decode_room":
        return f"no decode worker has {request.demand.blocks} blocks and a sequence slot free now"
    spec = request.spec.objectives
    limits, times = {"ttft": spec.ttft_ms, "tpot": spec.tpot_ms}, {"ttft": found.ttft_s, "tpot": found.tpot_s}
    asked = " and ".join(f"{name} {ms:g} ms" for name, ms in limits.items() if ms is not None)
    expected = " and ".join(f"{name} {s * 1e3:.0f} ms" for name, s in times.items() if s is not None)
    what = "others' objectives" if found.constraint == "others" else f"its objective for {found.constraint}"
    return f"{what} can't be kept now: asked {asked or 'nothing'}, expected {expected}"
