"""What a run's records say: pure functions of them.

Attainment: the share of all counted requests that ended well and kept every objective; refused and failed ones did
not. Goodput: such requests per second of the window in which requests were due. Throughput: tokens per second from the
start of that window to the last event. Percentiles interpolate linearly between order statistics.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from baton.bench.sending.records import OK, Record, values

PROMISE_SLACK = 1.2
"""A promise counts as kept up to this factor."""


@dataclass(frozen=True, slots=True)
class Distribution:
    """Of some values, in their unit."""

    count: int
    mean: float
    min: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: float


@dataclass(frozen=True, slots=True)
class Refusals:
    """Requests turned away before they were accepted: how many, how soon after they were due, and for want of what."""

    count: int
    answer_ms: Distribution | None
    constraints: dict[str, int]


@dataclass(frozen=True, slots=True)
class Promise:
    """A prediction of `Accepted` against what was achieved. A request that was to get a first token and got none has
    not kept its promise; the ratio and the errors are over those that got there."""

    count: int
    kept_share: float
    """Achieved at most `PROMISE_SLACK` times what was promised."""
    promised_over_achieved_p50: float
    error_p50: float
    """Of |achieved - promised| / promised."""
    error_p90: float


@dataclass(frozen=True, slots=True)
class CrossCheck:
    """The client's clock against the timelines: what the network and the client add, which should be little.

    Both durations start when the request went out, not when it was due. `disagreements` counts requests for which the
    server says that it kept the objectives and the client says that they were missed, or the reverse.
    """

    ttft_difference_ms: Distribution | None
    tpot_difference_ms: Distribution | None
    disagreements: int


@dataclass(frozen=True, slots=True)
class Summary:
    """Of all counted requests, or of one class. Durations in milliseconds, rates per second."""

    requests: int
    rate: float
    statuses: dict[str, int]
    attainment: float
    attainment_admitted: float | None
    ttft_attainment: float | None
    tpot_attainment: float | None
    goodput: float
    output_tokens_per_s: float
    prompt_tokens_per_s: float
    tokens_per_event: float | None
    ttft_ms: Distribution | None
    tpot_ms: Distribution | None
    itl_ms: Distribution | None
    total_ms: Distribution | None
    refusals: Refusals
    ttft_promise: Promise | None
    tpot_promise: Promise | None
    cross_check: CrossCheck
    cached_prompt_share: float | None


def distribution(found: Sequence[float]) -> Distribution | None:
    """None without values."""
    if not found:
        return None
    p50, p90, p95, p99 = (float(value) for value in np.percentile(found, (50, 90, 95, 99)))
    return Distribution(len(found), float(np.mean(found)), min(found), p50, p90, p95, p99, max(found))


def counted(records: Sequence[Record], warmup_s: float) -> list[Record]:
    """Those due after the warm-up."""
    return [record for record in records if record.planned.at_s >= warmup_s]


def summarize(records: Sequence[Record], window_s: float, begin_s: float = 0.0) -> Summary:
    """Of at least one record; `window_s` is the time in which they were due, from `begin_s` on."""
    chosen = list(records)
    admitted = [record for record in chosen if record.admitted]
    span_s = max(window_s, max(record.end_s for record in chosen) - begin_s)
    kept = sum(record.kept for record in chosen)
    served = [record for record in chosen if record.stamps]
    events = sum(len(record.stamps) for record in served)
    tokens = sum(record.output_tokens for record in served)
    return Summary(
        requests=len(chosen),
        rate=len(chosen) / window_s,
        statuses=dict(Counter(record.status for record in chosen)),
        attainment=kept / len(chosen),
        attainment_admitted=sum(record.kept for record in admitted) / len(admitted) if admitted else None,
        ttft_attainment=_share([record.ttft_kept for record in chosen]),
        tpot_attainment=_share([record.tpot_kept for record in chosen]),
        goodput=kept / window_s,
        output_tokens_per_s=tokens / span_s,
        prompt_tokens_per_s=sum(record.planned.prompt_tokens for record in served) / span_s,
        tokens_per_event=tokens / events if events else None,
        ttft_ms=distribution(values(chosen, lambda record: record.ttft_ms)),
        tpot_ms=distribution(values(chosen, lambda record: record.tpot_ms)),
        itl_ms=distribution([gap for record in chosen for gap in record.gaps_ms]),
        total_ms=distribution([record.total_ms for record in chosen if record.finished is not None]),
        refusals=_refusals([record for record in chosen if record.refused]),
        ttft_promise=_promise(chosen, _promised_ttft, lambda record: record.ttft_ms, lambda record: not record.stamps),
        tpot_promise=_promise(
            chosen, _promised_tpot, lambda record: record.tpot_ms, lambda record: record.status != OK
        ),
        cross_check=_cross_check(chosen),
        cached_prompt_share=cached_prompt_share(chosen),
    )


def by_class(records: Sequence[Record], window_s: float, begin_s: float = 0.0) -> dict[str, Summary]:
    """A summary for each class that has a request, by name."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record.planned.traffic.name, []).append(record)
    return {name: summarize(groups[name], window_s, begin_s) for name in sorted(groups)}


def _share(outcomes: Sequence[bool | None]) -> float | None:
    known = [outcome for outcome in outcomes if outcome is not None]
    return sum(known) / len(known) if known else None


def _refusals(refused: list[Record]) -> Refusals:
    answers = distribution([record.total_ms for record in refused])
    return Refusals(len(refused), answers, dict(Counter(record.constraint or "unnamed" for record in refused)))


def _promised_ttft(record: Record) -> float | None:
    return record.accepted.predicted_ttft_ms if record.accepted else None


def _promised_tpot(record: Record) -> float | None:
    return record.accepted.predicted_tpot_ms if record.accepted else None


def _promise(
    records: list[Record],
    promised_of: Callable[[Record], float | None],
    achieved_of: Callable[[Record], float | None],
    is_broken: Callable[[Record], bool],
) -> Promise | None:
    made = [(promise, achieved_of(record), is_broken(record)) for record in records if (promise := promised_of(record))]
    known = np.array([(a, b) for a, b, broken in made if b is not None and b > 0 and not broken], dtype=float)
    if not len(known):
        return None
    promised, achieved = known[:, 0], known[:, 1]
    error = np.abs(achieved - promised) / promised
    count = len(known) + sum(broken for _, _, broken in made)
    return Promise(
        count,
        float(np.sum(achieved <= PROMISE_SLACK * promised)) / count,
        float(np.median(promised / achieved)),
        float(np.median(error)),
        float(np.percentile(error, 90)),
    )


def _cross_check(records: list[Record]) -> CrossCheck:
    ttft, tpot, disagreements = [], [], 0
    for record in records:
        if record.finished is None or not record.stamps:
            continue
        timeline, slo = record.finished.timeline, record.finished.slo
        ttft.append((record.stamps[0] - record.sent_s) * 1e3 - timeline.ttft_ms)
        if timeline.tpot_ms is not None and record.tpot_ms is not None:
            tpot.append(record.tpot_ms - timeline.tpot_ms)
        if slo is not None:
            ours_theirs = ((record.ttft_kept, slo.ttft_kept), (record.tpot_kept, slo.tpot_kept))
            disagreements += any(None not in pair and pair[0] != pair[1] for pair in ours_theirs)
    return CrossCheck(distribution(ttft), distribution(tpot), disagreements)


def cached_prompt_share(records: Sequence[Record]) -> float | None:
    """Of the prompt tokens of finished requests, those that the server found in a prefix cache."""
    usages = [record.finished.usage for record in records if record.finished is not None]
    prompts = sum(usage.prompt_tokens for usage in usages)
    return sum(usage.cached_prompt_tokens for usage in usages) / prompts if prompts else None
