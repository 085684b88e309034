"""How long things would take: pure functions of one worker in a snapshot.

TTFT is the prompts ahead plus the prompt's own chunks. TPOT is a decode step with this sequence in it. Every function
also says whether somebody who was placed before would miss an objective that he still keeps without this request.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from baton.cost import LEAST_CHUNK, MARGIN, STRETCH, StepCost, pairs
from baton.worker.prompt_queue import AGEING_S, PRIORITY_S
from router.placement.snapshot import Ask, DecodeLoad, PrefillLoad, Queued

TRIP_S = 0.004
"""What lies outside a worker's own time: messages and their handling."""


class Forecast(NamedTuple):
    """Seconds to the first token, as promised and as predicted; `breaks` when others would miss theirs for it. `queued`
    is the prompt in the worker's queue."""

    ttft_s: float
    breaks: bool
    raw_s: float
    queued: Queued


def rank_of(ask: Ask) -> float:
    """When its first token is due, as the worker's queue will order it."""
    return ask.now + (AGEING_S if ask.ttft_s is None else ask.ttft_s) - PRIORITY_S * ask.priority


def prefill(worker: PrefillLoad, ask: Ask) -> Forecast:
    """On a prefill worker."""
    cost = worker.cost
    assert cost is not None, "a worker that has told its cost"
    new = ask.tokens - worker.cached_tokens
    work = cost.prefill(new, worker.cached_tokens, worker.chunk_tokens)
    queued, ahead, breaks = _placed(worker, ask, cost, work, work / -(-new // worker.chunk_tokens))
    raw = ahead + work + TRIP_S
    return Forecast(raw * worker.promise, breaks, raw, queued)


def direct(worker: DecodeLoad, ask: Ask) -> Forecast:
    """In place on a decode worker, beside its residents."""
    cost = worker.cost
    assert cost is not None, "a worker that has told its cost"
    new, cached = ask.tokens - worker.cached_tokens, worker.cached_tokens
    seconds, chunk_s, misses = _beside(worker, cost, new, cached, ask.tpot_s)
    queued, ahead, breaks = _placed(worker, ask, cost, seconds, chunk_s)
    if worker.sequences and not ahead:
        ahead = cost.decode(worker.sequences, worker.tokens) / 2  # of the step under way
    raw = ahead + seconds + TRIP_S
    return Forecast(raw * worker.promise, breaks or misses, raw, queued)


def step(worker: DecodeLoad, ask: Ask) -> float:
    """Seconds per token with this sequence resident, and with its share of those that are on their way."""
    cost = worker.cost
    assert cost is not None, "a worker that has told its cost"
    seconds = _bare_step(worker, cost, ask)
    if worker.queue:  # prompts are computed beside: each step takes what the objectives leave
        limit = min((s for s in (worker.strictest_s, ask.tpot_s) if s is not None), default=STRETCH * seconds)
        seconds = max(seconds, MARGIN * limit)
    return seconds


def breaks_tpot(worker: DecodeLoad, ask: Ask) -> bool:
    """Whether the strictest objective among its sequences is kept without this one and missed with it."""
    if worker.strictest_s is None or worker.cost is None or not worker.cost.knows_decode:
        return False
    without = worker.cost.decode(worker.sequences + ask.unbound, worker.tokens + ask.unbound_tokens)
    return without <= worker.strictest_s < _bare_step(worker, worker.cost, ask)


def soonest(worker: PrefillLoad | DecodeLoad, ask: Ask) -> float:
    """Seconds to the first token if nothing else were there."""
    assert worker.cost is not None, "a worker that has told its cost"
    cost, cached = worker.cost, worker.cached_tokens
    return (cost.prefill(ask.tokens - cached, cached, worker.chunk_tokens) + TRIP_S) * worker.promise


def handed_over(worker: DecodeLoad, ask: Ask, step_s: float) -> float:
    """Seconds per token of a sequence that comes in over a handoff, where a step with it takes `step_s`: it waits for
    half a step under way at first, which weighs the more the fewer tokens there are. Chunks beside it are smaller until
    that is made good, so its own steps may be as short as they are without any."""
    assert worker.cost is not None, "a worker that has told its cost"
    return max(step_s, _bare_step(worker, worker.cost, ask) + (step_s / 2 + worker.handoff_s) / max(ask.gaps, 1))


def _bare_step(worker: DecodeLoad, cost: StepCost, ask: Ask) -> float:
    return cost.decode(worker.sequences + 1 + ask.unbound, worker.tokens + ask.demand.tokens + ask.unbound_tokens)


def drain(worker: DecodeLoad) -> float:
    """About how long until one of its sequences ends: half a usual one's steps, over their number."""
    if worker.cost is None or not worker.sequences:
        return 0.0
    step_s = worker.cost.decode(worker.sequences, worker.tokens)
    return worker.mean_tokens * step_s / 2 / worker.sequences


def _placed(
    worker: PrefillLoad | DecodeLoad, ask: Ask, cost: StepCost, work_s: float, chunk_s: float
) -> tuple[Queued, float, bool]:
    """The prompt in the worker's queue, what is ahead of it, and whether others would become late by it. One that can't
    be in time makes way there, so it does here: else it would seem to be in the way of all that come after it."""
    queued = Queued(rank_of(ask), work_s, None if ask.ttft_s is None else ask.now + ask.ttft_s, chunk_s)
    ahead, breaks = _queue(worker.queue, queued, ask.now)
    if ask.ttft_s is not None and ahead + work_s > ask.ttft_s:
        chunk_s = min(chunk_s, cost.prefill(cost.making_way(worker.chunk_tokens), 0, worker.chunk_tokens))
        queued = Queued(queued.rank + AGEING_S, work_s, None, chunk_s)
        ahead, breaks = _queue(worker.queue, queued, ask.now)
    return queued, ahead, breaks


def _queue(queue: Sequence[Queued], ours: Queued, now: float) -> tuple[float, bool]:
    """Seconds of work that goes first, the rest of a less urgent chunk included, and whether what comes after would
    become late by ours."""
    ahead, behind = 0.0, 0.0
    breaks = False
    for other in queue:
        if other.rank <= ours.rank:
            ahead += other.seconds
            continue
        ahead += other.chunk_s
        ends = now + ahead + behind + other.seconds
        breaks = breaks or (other.due_at is not None and ends <= other.due_at < ends + ours.seconds)
        behind += other.seconds - other.chunk_s
    return ahead, breaks


def _beside(
    worker: DecodeLoad, cost: StepCost, new: int, cached: int, tpot_s: float | None
) -> tuple[float, float, bool]:
    """Seconds of a prompt beside the residents, those of one of its chunks, and whether they would miss objectives."""
    if not worker.sequences:
        chunk = cost.fits_alone(tpot_s, cached + new // 2, worker.chunk_tokens)
        work = cost.prefill(new, cached, chunk)
        return work, work / -(-new // chunk), False
    work = cost.prefill(new, cached, worker.chunk_tokens)
    base = cost.decode(worker.sequences, worker.tokens)
    limit = worker.strictest_s if worker.strictest_s is not None and base <= worker.strictest_s else None
    fits = cost.fits_beside(base, limit, cached + new // 2, worker.chunk_tokens)
    chunk = min(max(fits, LEAST_CHUNK), new)
    chunks = -(-new // chunk)
    seconds = max(cost.mixed * (chunks * base + cost.per_token * new + cost.per_pair * pairs(new, cached)), work)
    # What the margin is for may be used up before an objective counts as missed: it is for the mean of many steps.
    least = cost.mixed * (base + LEAST_CHUNK * cost.per_token)
    return seconds, seconds / chunks, limit is not None and least > limit
