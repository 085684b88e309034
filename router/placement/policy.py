"""Which workers serve a request, and by which path: pure functions of a snapshot.

No clock, no I/O, no randomness: the same code runs live, in tests and in a simulator. Each decision carries all its
candidates and their predictions, so that it can be explained later.

A request that meets its objectives over both pools takes them: that leaves the decode workers undisturbed. It is
computed in place on a decode worker where only that meets its objectives; where that is sooner, and over both pools
most of its time would be gone; or where that is light work (a short prompt, the next turn of a conversation whose KV
is cached, an idle worker) and takes less than half the time. Where no way meets them, the plan is one that misses by
about the least factor, over both pools first; the caller refuses the request or serves it so.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import NamedTuple

from router.placement import prediction
from router.placement.offers import Candidate, Way, best_landing, has_room, in_place, land, over_both
from router.placement.prediction import knows_decode, knows_prefill
from router.placement.snapshot import Ask, DecodeLoad, Demand, PrefillLoad, Queued

DIRECT_GAIN = 0.5
"""A prompt that meets its objectives either way is computed in place in less than this share of the time."""
COMFORT = 0.6
"""The share of its TTFT objective above which a prompt goes in place if that is sooner. If it went only where both
pools miss the objective, the prefill workers' queues would fill until every error of a prediction is a miss."""
NEAR, NEAR_S = 1.05, 0.001
"""Times within this factor and these seconds of the soonest are as good. Of those the worker chosen longest ago is
taken, or all prompts would overwrite one worker's cache while the others' lie idle."""
AS_GOOD = 1.25
"""Where no offer keeps all objectives, those that miss by up to this factor more than the least are as good, since
predictions are no finer then: over both pools comes first, then the soonest."""
LEAST_RETRY_S = 0.05
HOPELESS_RETRY_S = 30.0
"""Where an idle cluster would miss the objective too: only other workers would help."""


class Decision(NamedTuple):
    """The chosen worker, why, and all candidates; whether it `keeps` all objectives and has room."""

    chosen: str
    reason: str
    candidates: tuple[Candidate, ...]
    keeps: bool = True


class Plan(NamedTuple):
    """Where the prompt goes. Without a prediction the times are None and `meets` is True. `raw_ttft_s` is predicted,
    `ttft_s` promised; `queued` is the prompt in the worker's queue.

    `constraint` names what is missed: ttft, tpot, others (an objective of an earlier request) or decode_room (no decode
    worker has the blocks and a slot free); that may have changed after `retry_s`.
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
        Candidate(worker.name, worker.queued_tokens, not (note := _too_small(worker, blocks)), note, Way.PREFILL)
        for worker in workers
    )
    feasible = [(candidate.load, candidate.name) for candidate in candidates if candidate.feasible]
    if not feasible:
        return None
    load, name = min(feasible)
    return Decision(name, f"least to compute: {load:.0f} tokens", candidates)


def plan(
    ask: Ask, prefills: Sequence[PrefillLoad], decodes: Sequence[DecodeLoad], blocks: int, direct: bool = True
) -> Plan | None:
    """Path and worker of a prompt of `blocks` blocks; `direct` allows it to be computed on a decode worker.

    None when no pool can hold it. Where some worker has not told its cost yet, tokens decide instead of times.
    """
    fitting = [worker for worker in decodes if worker.capacity_blocks >= ask.demand.at_most]
    able = [worker for worker in prefills if worker.capacity_blocks >= blocks]
    if not (all(map(knows_prefill, able)) and all(map(knows_decode, fitting))):
        return _by_tokens(ask, prefills, fitting, blocks, direct)
    landings = [land(worker, ask) for worker in fitting]
    best = best_landing(ask, fitting, landings)
    offers = [over_both(ask, worker, best) for worker in able] if fitting or ask.single_token else []
    if direct:
        offers += [
            in_place(ask, worker, landing)
            for worker, landing in zip(fitting, landings, strict=True)
            if knows_prefill(worker)
        ]
    if not offers:  # nor would there be, where a decode worker's own prompts have no known cost
        return _by_tokens(ask, prefills, fitting, blocks, direct) if fitting else None
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
    """The least loaded worker, those first that have room for its likely length and keep all objectives. Cached tokens
    of the prompt are not sent again and take no new blocks, so they do not count as load: conversations stay where they
    are until another worker has less load by more than that.

    A worker without room may still be chosen: the sequence waits there. `exclude` are never chosen;
    `avoid` is the one that just refused, chosen only when there is no other. None when no worker is left.
    """
    ask = Ask(0.0, demand.tokens, demand, tpot_s=tpot_s)
    candidates, keys = [], []
    for worker in workers:
        obstacle = "excluded" if worker.name in exclude else _too_small(worker, demand.at_most)
        room = not obstacle and has_room(worker, demand)
        load = (worker.tokens + demand.tokens - worker.cached_tokens) / worker.capacity_blocks
        seconds = prediction.step(worker, ask) if knows_decode(worker) else None
        late = seconds is not None and tpot_s is not None and seconds > tpot_s
        misses = late or prediction.breaks_tpot(worker, ask)
        note = obstacle or ("" if room else "no room now") or ("an objective would be missed" if misses else "")
        candidates.append(Candidate(worker.name, load, room, note, tpot_s=seconds))
        if not obstacle:
            keys.append((worker.name == avoid, not room, misses, load, worker.sequences, worker.name))
    if not keys:
        return None
    _, full, misses, _, _, name = min(keys)
    reason = "least loaded; none has room" if full else "least loaded with room"
    return Decision(name, reason, tuple(candidates), not full and not misses)


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
    both = _best([offer for offer in kept if offer.way is Way.PREFILL])
    here = _best([offer for offer in kept if offer.way is Way.DIRECT])
    light = _best([offer for offer in kept if offer.light])
    if both is not None:
        seconds = _seconds(both)
        if light is not None and _seconds(light) < DIRECT_GAIN * seconds:
            return _planned(light, offers, "in place: light work in less than half the time")
        hurried = ask.ttft_s is not None and seconds > COMFORT * ask.ttft_s
        if hurried and here is not None and _seconds(here) < seconds:
            return _planned(here, offers, "in place: sooner, and over both pools little time would be left")
        return _planned(both, offers, "over both pools: soonest that keeps all objectives")
    if here is not None:
        alone = all(offer.way is Way.DIRECT for offer in offers)
        return _planned(here, offers, "in place: soonest" if alone else "in place: only so are all objectives kept")
    best = _least_missing(offers)
    found = _planned(best, offers, f"nobody keeps all objectives; misses by about the least factor ({best.note})")
    return found._replace(meets=False, constraint=best.note, retry_s=_retry(ask, best, prefills, decodes))


def _least_missing(offers: Sequence[Candidate]) -> Candidate:
    """An offer that breaks no other request's objective, if there is one. Over both pools first: prompts in place would
    pile up on decode workers that are behind already, while the prefill workers rest."""
    harmless = [offer for offer in offers if not offer.breaks] or offers
    limit = max(1.0, min(offer.miss for offer in harmless)) * AS_GOOD
    near = (offer for offer in harmless if offer.miss <= limit)
    return min(near, key=lambda offer: (offer.way is Way.DIRECT, _soonest(offer)))


def _planned(offer: Candidate, offers: tuple[Candidate, ...], reason: str) -> Plan:
    assert offer.way is not None, "offers name their way"
    return Plan(offer.name, offer.way, True, reason, offers, offer.ttft_s, offer.tpot_s)


def _best(offers: Sequence[Candidate]) -> Candidate | None:
    """The soonest; of those as good, the one chosen longest ago."""
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
    """Seconds until the backlog is short enough or a sequence has ended; long where even an idle cluster would miss the
    objective, so that the client is not refused again and again."""
    if offer.note == "ttft" and ask.ttft_s is not None:
        workers: list[PrefillLoad | DecodeLoad] = [*prefills, *decodes]
        alone = min(prediction.soonest(worker, ask) for worker in workers if knows_prefill(worker))
        return HOPELESS_RETRY_S if alone > ask.ttft_s else max(LEAST_RETRY_S, _seconds(offer) - ask.ttft_s)
    if offer.note == "tpot" and ask.tpot_s is not None:
        alone = min(worker.cost.decode(1, ask.demand.tokens) for worker in decodes if worker.cost is not None)
        if alone > ask.tpot_s:
            return HOPELESS_RETRY_S
    busy = (prediction.drain(worker) for worker in decodes if worker.sequences)
    return max(LEAST_RETRY_S, min(busy, default=LEAST_RETRY_S))


def _too_small(worker: PrefillLoad | DecodeLoad, blocks: int) -> str:
    """Why its pool can't hold the blocks; empty where it can."""
    return "" if worker.capacity_blocks >= blocks else f"its pool has {worker.capacity_blocks} blocks"
