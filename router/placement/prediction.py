"""TTFT and TPOT of a request on one worker: pure functions of a snapshot.

TTFT is the prompts ahead plus the prompt's own chunks. TPOT is a decode step with this sequence in it. A request
`breaks` an objective that an earlier request would keep without it and miss with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from baton.cost import LEAST_CHUNK, MARGIN, STRETCH, StepCost, pairs
from baton.worker.prompt_queue import AGEING_S, PRIORITY_S
from router.placement.snapshot import Ask, DecodeLoad, PrefillLoad, Queued

TRIP_S = 0.004
"""Messages and their handling, which no worker's own time includes."""


class Forecast(NamedTuple):
    """Seconds to the first token, as promised (`ttft_s`) and as predicted (`raw_s`). `queued` is the prompt in the
    worker's queue."""

    ttft_s: float
    breaks: bool
    raw_s: float
    queued: Queued


def knows_prefill(worker: PrefillLoad | DecodeLoad) -> bool:
    """Whether the worker has told the cost of a prompt."""
    return worker.cost is not None and worker.cost.knows_prefill


def knows_decode(worker: DecodeLoad) -> bool:
    """Whether the worker has told the cost of a decode step."""
    return worker.cost is not None and worker.cost.knows_decode


def prefill(worker: PrefillLoad, ask: Ask) -> Forecast:
    cost = _cost(worker)
    new = ask.tokens - worker.cached_tokens
    work = cost.prefill(new, worker.cached_tokens, worker.chunk_tokens)
    queued, ahead, breaks = _placed(worker, ask, cost, work, work / -(-new // worker.chunk_tokens))
    raw = ahead + work + TRIP_S
    return Forecast(raw * worker.promise, breaks, raw, queued)


def direct(worker: DecodeLoad, ask: Ask) -> Forecast:
    """In place on a decode worker, beside its residents."""
    cost = _cost(worker)
    new, cached = ask.tokens - worker.cached_tokens, worker.cached_tokens
    seconds, chunk_s, misses = _beside(worker, cost, new, cached, ask.tpot_s)
    queued, ahead, breaks = _placed(worker, ask, cost, seconds, chunk_s)
    if worker.sequences and not ahead:
        ahead = cost.decode(worker.sequences, worker.tokens) / 2  # of the step under way
    raw = ahead + seconds + TRIP_S
    return Forecast(raw * worker.promise, breaks or misses, raw, queued)


def step(worker: DecodeLoad, ask: Ask) -> float:
    """Seconds per token with this sequence resident, and with the worker's share of the unbound ones."""
    seconds = _bare_step(worker, ask)
    if worker.queue:  # prompts are computed beside: each step takes the time that the objectives leave
        limit = min((s for s in (worker.strictest_s, ask.tpot_s) if s is not None), default=STRETCH * seconds)
        seconds = max(seconds, MARGIN * limit)
    return seconds


def breaks_tpot(worker: DecodeLoad, ask: Ask) -> bool:
    """Whether the strictest objective among its sequences is kept without this one and missed with it."""
    if worker.strictest_s is None or not knows_decode(worker):
        return False
    without = _cost(worker).decode(worker.sequences + ask.unbound, worker.tokens + ask.unbound_tokens)
    return without <= worker.strictest_s < _bare_step(worker, ask)


def soonest(worker: PrefillLoad | DecodeLoad, ask: Ask) -> float:
    """Seconds to the first token on an idle worker."""
    cached = worker.cached_tokens
    return (_cost(worker).prefill(ask.tokens - cached, cached, worker.chunk_tokens) + TRIP_S) * worker.promise


def handed_over(worker: DecodeLoad, ask: Ask, step_s: float) -> float:
    """Seconds per token of a sequence that is handed over, where a step with it takes `step_s`. It waits for the
    handoff and half a step first, which weighs more the fewer tokens it has. Chunks beside it are smaller until that is
    made good, so its own steps may be as short as without any."""
    return max(step_s, _bare_step(worker, ask) + (step_s / 2 + worker.handoff_s) / max(ask.gaps, 1))


def _cost(worker: PrefillLoad | DecodeLoad) -> StepCost:
    assert worker.cost is not None, "a worker that has told its cost"
    return worker.cost


def _bare_step(worker: DecodeLoad, ask: Ask) -> float:
    """Seconds of a step without chunks."""
    sequences, tokens = worker.sequences + 1 + ask.unbound, worker.tokens + ask.demand.tokens + ask.unbound_tokens
    return _cost(worker).decode(sequences, tokens)


def drain(worker: DecodeLoad) -> float:
    """Seconds until one of its sequences ends, roughly: half the steps of a mean one, over their number."""
    if worker.cost is None or not worker.sequences:
        return 0.0
    step_s = worker.cost.decode(worker.sequences, worker.tokens)
    return worker.mean_tokens * step_s / 2 / worker.sequences


def _placed(
    worker: PrefillLoad | DecodeLoad, ask: Ask, cost: StepCost, work_s: float, chunk_s: float
) -> tuple[Queued, float, bool]:
    """The prompt in the worker's queue, the seconds ahead of it, and whether it makes others late. A prompt that can't
    be in time makes way in the worker's queue, and so it does here: it must not seem to delay all later ones."""
    rank = ask.now + (AGEING_S if ask.ttft_s is None else ask.ttft_s) - PRIORITY_S * ask.priority
    queued = Queued(rank, work_s, None if ask.ttft_s is None else ask.now + ask.ttft_s, chunk_s)
    ahead, breaks = _queue(worker.queue, queued, ask.now)
    if ask.ttft_s is not None and ahead + work_s > ask.ttft_s:
        chunk_s = min(chunk_s, cost.prefill(cost.making_way(worker.chunk_tokens), 0, worker.chunk_tokens))
        queued = Queued(queued.rank + AGEING_S, work_s, None, chunk_s)
        ahead, breaks = _queue(worker.queue, queued, ask.now)
    return queued, ahead, breaks


def _queue(queue: Sequence[Queued], ours: Queued, now: float) -> tuple[float, bool]:
    """Seconds of work that goes first, the rest of a less urgent chunk included, and whether ours makes a later prompt
    miss its objective."""
    ahead, behind, breaks = 0.0, 0.0, False
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
    """Seconds of a prompt beside the residents, those of one chunk, and whether residents would miss objectives."""
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
    # Without the margin: an objective is for the mean of many steps, so the margin may be used up before it is missed.
    least = cost.mixed * (base + LEAST_CHUNK * cost.per_token)
    return seconds, seconds / chunks, limit is not None and least > limit
