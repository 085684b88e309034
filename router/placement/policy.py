"""Which workers serve a request, and by which path: pure functions of a snapshot.

No clock, no I/O, no randomness: the same code runs live, in tests and in a simulator. Each pick carries every candidate
with what was predicted for it, so that it can be explained later.

A request that meets its objectives over both pools takes them: that leaves the decode workers undisturbed. It is
computed in place on a decode worker where only that meets its objectives; where that is sooner, and over both pools
most of its time would be gone; or where that is light work (a short prompt, the next turn of a conversation whose KV
is there, an idle worker) and takes less than half the time. Where nothing meets them, what misses by about the least
factor is offered, over both pools first; the caller refuses it or serves it as well as can be.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import NamedTuple

from router.placement import prediction
from router.placement.offers import Candidate, Way, best_landing, has_room, in_place, land, over_both
from router.placement.snapshot import Ask, DecodeLoad, Demand, PrefillLoad, Queued

DIRECT_GAIN = 0.5
"""In place, a prompt that meets its objectives either way must be faster by this factor."""
COMFORT = 0.6
"""Of its TTFT objective, what a prompt may take over both pools before it goes in place where that is sooner: waiting
until only that is left would fill the prefill workers' queues up to where every error of a prediction is a miss."""
NEAR, NEAR_S = 1.05, 0.001
"""Times within this factor and these seconds of the soonest are as good: then it is whoever was chosen longest ago, or
one worker's cache would be overwritten by all prompts while the others' lie idle."""
AS_GOOD = 1.25
"""Where nobody keeps all objectives, ways that miss by no more than this factor of the least one are as good, since
predictions are no finer then: over both pools comes first, and then what is soonest."""
LEAST_RETRY_S = 0.05
HOPELESS_RETRY_S = 30.0
"""Where an idle cluster would miss the objective too: nothing drains that would help, only other workers would."""


class Decision(NamedTuple):
    """The worker that was chosen, why, and whom else there was; whether it `keeps` all objectives and has room."""

    chosen: str
    reason: str
    candidates: tuple[Candidate, ...]
    keeps: bool = True


class Plan(NamedTuple):
    """Where the prompt goes. Without a prediction the times are None and `meets` is True. `raw_ttft_s` is what was
    predicted before anything was added to keep the promise; `queued` is the prompt in the worker's queue.

    `constraint` names what is missed: ttft, tpot, others (an objective of somebody who was placed before) or
    decode_room (no decode worker has the blocks and a slot free); `retry_s` is when that may have changed.
    """

    chosen: str
    way: Way
    meets: bool
    reason: str
    candidates: tuple[Candidate, ...]
    ttft_s: float | None = None
    tpot_s: float | None = None
    constraint: str = ""
    retry_s: float = 1.0
    raw_ttft_s: float | None = None
    queued: Queued | None = None


def pick_prefill(workers: Sequence[PrefillLoad], blocks: int) -> Decision | None:
    """The worker with the least to compute whose pool can hold `blocks`; None when there is no such worker."""
    candidates = tuple(
        Candidate(
            worker.name,
            worker.queued_tokens,
            worker.capacity_blocks >= blocks,
            "" if worker.capacity_blocks >= blocks else f"its pool has {worker.capacity_blocks} blocks",
            Way.PREFILL,
        )
        for worker in workers
    )
    best = min(
        (candidate for candidate in candidates if candidate.feasible),
        key=lambda candidate: (candidate.load, candidate.name),
        default=None,
    )
    if best is None:
        return None
    return Decision(best.name, f"least to compute: {best.load:.0f} tokens", candidates)


def plan(
    ask: Ask, prefills: Sequence[PrefillLoad], decodes: Sequence[DecodeLoad], blocks: int, direct: bool = True
) -> Plan | None:
    """Path and worker of a prompt of `blocks` blocks; `direct` allows it to be computed on a decode worker.

    None when no pool can hold it. Where some worker has not told its cost yet, tokens decide instead of times.
    """
    fitting = [worker for worker in decodes if worker.capacity_blocks >= ask.demand.blocks]
    able = [worker for worker in prefills if worker.capacity_blocks >= blocks]
    for worker in able:
        if worker.cost is None or not worker.cost.knows_prefill:
            return _by_tokens(ask, prefills, fitting, blocks, direct)
    for other in fitting:
        if other.cost is None or not other.cost.knows_decode:
            return _by_tokens(ask, prefills, fitting, blocks, direct)
    landings = [land(worker, ask) for worker in fitting]
    best = best_landing(ask, fitting, landings)
    offers = [over_both(ask, worker, best) for worker in able] if fitting or ask.single_token else []
    if direct:
        offers += [
            in_place(ask, worker, landing)
            for worker, landing in zip(fitting, landings, strict=True)
            if worker.cost and worker.cost.knows_prefill
        ]
    if not offers:
        return None
    found = _choose(ask, tuple(offer for offer, _ in offers), able, fitting)
    forecast = next(forecast for offer, forecast in offers if offer.name == found.chosen and offer.way is found.way)
    return found._replace(raw_ttft_s=forecast.raw_s, queued=forecast.queued)


def pick_decode(
    workers: Sequence[DecodeLoad],
    demand: Demand,
    exclude: Set[str] = frozenset(),
    avoid: str = "",
    tpot_s: float | None = None,
) -> Decision | None:
    """The least loaded worker, those first that have room for the whole sequence and keep all objectives. Cached tokens
    of the prompt are not sent again and take no new blocks, so they do not count as load: conversations stay where they
    are until another worker has less to carry by more than that.

    A worker without room may still be chosen: it refuses, and the prompt waits for it. `exclude` are out of the
    question; `avoid` is the one that just refused, taken only when there is no other. None when nobody is left.
    """
    ask = Ask(0.0, demand.tokens, demand, tpot_s=tpot_s)
    candidates, best, best_key, best_room, best_misses = [], None, None, False, False
    for worker in workers:
        obstacle = _obstacle(worker, demand, exclude)
        room = not obstacle and has_room(worker, demand)
        load = (worker.tokens + demand.tokens - worker.cached_tokens) / worker.capacity_blocks
        seconds = prediction.step(worker, ask) if worker.cost is not None and worker.cost.knows_decode else None
        late = seconds is not None and tpot_s is not None and seconds > tpot_s
        misses = late or prediction.breaks_tpot(worker, ask)
        note = obstacle or ("" if room else "no room now") or ("an objective would be missed" if misses else "")
        candidates.append(Candidate(worker.name, load, room, note, tpot_s=seconds))
        key = (worker.name == avoid, not room, misses, load, worker.sequences, worker.name)
        if not obstacle and (best_key is None or key < best_key):
            best, best_key, best_room, best_misses = worker, key, room, misses
    if best is None:
        return None
    reason = "least loaded with room" if best_room else "least loaded; none has room"
    return Decision(best.name, reason, tuple(candidates), best_room and not best_misses)


def _by_tokens(
    ask: Ask, prefills: Sequence[PrefillLoad], decodes: Sequence[DecodeLoad], blocks: int, direct: bool
) -> Plan | None:
    found = pick_prefill(prefills, blocks)
    if found is not None:
        return Plan(found.chosen, Way.PREFILL, True, found.reason, found.candidates)
    here = pick_decode(decodes, ask.demand) if direct else None
    return here and Plan(here.chosen, Way.DIRECT, True, here.reason, here.candidates)


def _choose(
    ask: Ask, offers: tuple[Candidate, ...], prefills: Sequence[PrefillLoad], decodes: Sequence[DecodeLoad]
) -> Plan:
    kept = [offer for offer in offers if offer.feasible]
    good_both = _best([offer for offer in kept if offer.way is Way.PREFILL])
    here = [offer for offer in kept if offer.way is Way.DIRECT]
    if good_both is not None:
        light = _best([offer for offer in here if offer.light])
        if light is not None and _seconds(light) < DIRECT_GAIN * _seconds(good_both):
            return _planned(light, offers, "in place: light work in less than half the time")
        if ask.ttft_s is not None and _seconds(good_both) > COMFORT * ask.ttft_s:
            good_here = _best(here)
            if good_here is not None and _seconds(good_here) < _seconds(good_both):
                return _planned(good_here, offers, "in place: sooner, and over both pools little time would be left")
        return _planned(good_both, offers, "over both pools: soonest that keeps all objectives")
    if (good_here := _best(here)) is not None:
        alone = all(offer.way is Way.DIRECT for offer in offers)
        return _planned(
            good_here, offers, "in place: soonest" if alone else "in place: only so are all objectives kept"
        )
    best = _least_missing(offers)
    made = _planned(best, offers, f"nobody keeps all objectives; misses by about the least factor ({best.note})")
    return made._replace(meets=False, constraint=best.note, retry_s=_retry(ask, best, prefills, decodes))


def _least_missing(offers: Sequence[Candidate]) -> Candidate:
    """Where nobody keeps all objectives: at least it costs nobody else one. Prompts in place would pile up on decode
    workers that are behind already, each making them look worse, while the prefill workers beside them rest."""
    harmless = [offer for offer in offers if not offer.breaks] or offers
    limit = max(1.0, min(offer.miss for offer in harmless)) * AS_GOOD
    near = (offer for offer in harmless if offer.miss <= limit)
    return min(near, key=lambda offer: (offer.way is Way.DIRECT, _soonest(offer)))


def _planned(offer: Candidate, offers: tuple[Candidate, ...], reason: str) -> Plan:
    assert offer.way is not None, "offers name their way"
    return Plan(offer.name, offer.way, True, reason, offers, offer.ttft_s, offer.tpot_s)


def _best(offers: Sequence[Candidate]) -> Candidate | None:
    """The soonest; of those that are as good, the one chosen longest ago."""
    if len(offers) < 2:
        return offers[0] if offers else None
    seconds = [_seconds(offer) for offer in offers]
    limit = min(seconds) * NEAR + NEAR_S
    near = [offer for offer, its in zip(offers, seconds, strict=True) if its <= limit]
    return near[0] if len(near) == 1 else min(near, key=lambda offer: (offer.chosen_at, _soonest(offer)))


def _soonest(offer: Candidate) -> tuple[float, float, str]:
    return _seconds(offer), offer.load, offer.name


def _seconds(offer: Candidate) -> float:
    assert offer.ttft_s is not None, "offers are predicted"
    return offer.ttft_s


def _retry(ask: Ask, offer: Candidate, prefills: Sequence[PrefillLoad], decodes: Sequence[DecodeLoad]) -> float:
    """When a backlog will have drained so far, or a sequence will have ended; long where even an idle cluster would
    miss the objective, so that who comes back is not refused again and again."""
    if offer.note == "ttft" and ask.ttft_s is not None:
        workers: list[PrefillLoad | DecodeLoad] = [*prefills, *decodes]
        alone = min(prediction.soonest(worker, ask) for worker in workers if _computes(worker))
        return HOPELESS_RETRY_S if alone > ask.ttft_s else max(LEAST_RETRY_S, _seconds(offer) - ask.ttft_s)
    if offer.note == "tpot" and ask.tpot_s is not None:
        alone = min(worker.cost.decode(1, ask.demand.tokens) for worker in decodes if worker.cost is not None)
        if alone > ask.tpot_s:
            return HOPELESS_RETRY_S
    busy = (prediction.drain(worker) for worker in decodes if worker.sequences)
    return max(LEAST_RETRY_S, min(busy, default=LEAST_RETRY_S))


def _computes(worker: PrefillLoad | DecodeLoad) -> bool:
    return worker.cost is not None and worker.cost.knows_prefill


def _obstacle(worker: DecodeLoad, demand: Demand, exclude: Set[str]) -> str:
    """Why the worker is out of the question; empty when it is not."""
    if worker.name in exclude:
        return "excluded"
    return "" if worker.capacity_blocks >= demand.blocks else f"its pool has {worker.capacity_blocks} blocks"
