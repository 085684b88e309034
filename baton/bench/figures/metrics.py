"""The figures of a run: pure functions of its records.

Attainment: the share of all counted requests that ended well and kept every objective, which refused and failed ones
did not. Goodput: such requests per second of the window in which requests were due. Throughput: tokens per second from
the start of that window to the last event. Percentiles interpolate linearly between order statistics.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter

import numpy as np

from baton.bench.sending.records import OK, Record

PROMISE_SLACK = 1.2
"""A promise is kept if the achieved time is at most this many times the promised one."""


@dataclass(frozen=True, slots=True)
class Distribution:
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
    """Requests refused before they were accepted; `constraints` counts the resources that were short."""

    count: int
    answer_ms: Distribution | None
    constraints: dict[str, int]


@dataclass(frozen=True, slots=True)
class Promise:
    """Predictions of `Accepted` against achieved times. A request that never achieved its time broke its promise, and
    does not count in the ratio and the errors."""

    count: int
    kept_share: float
    promised_over_achieved_p50: float
    error_p50: float
    """Of |achieved - promised| / promised."""
    error_p90: float


@dataclass(frozen=True, slots=True)
class CrossCheck:
    """The client's times less the server's timelines: network and client should add little.

    Both count from when the request was sent, not from when it was due. `disagreements` counts requests whose
    objectives client and server judge differently.
    """

    ttft_difference_ms: Distribution | None
    tpot_difference_ms: Distribution | None
    disagreements: int


@dataclass(frozen=True, slots=True)
class Summary:
    """Of all counted requests, or of one class. Rates are per second."""

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


def distribution(values: Sequence[float | None]) -> Distribution | None:
    """Of those that are not None; None without any."""
    found = [value for value in values if value is not None]
    if not found:
        return None
    p50, p90, p95, p99 = (float(value) for value in np.percentile(found, (50, 90, 95, 99)))
    return Distribution(len(found), float(np.mean(found)), min(found), p50, p90, p95, p99, max(found))


def counted(records: Sequence[Record], warmup_s: float) -> list[Record]:
    """The records due after the warm-up."""
    return [record for record in records if record.planned.at_s >= warmup_s]


def summarize(records: Sequence[Record], window_s: float, begin_s: float = 0.0) -> Summary:
    """Sums up at least one record; all were due within `window_s` seconds from `begin_s` on."""
    admitted = [record for record in records if record.admitted]
    refused = [record for record in records if record.refused]
    short = dict(Counter(record.constraint or "unnamed" for record in refused))
    span_s = max(window_s, max(record.end_s for record in records) - begin_s)
    kept = sum(record.kept for record in records)
    served = [record for record in records if record.stamps]
    events = sum(len(record.stamps) for record in served)
    tokens = sum(record.output_tokens for record in served)
    return Summary(
        requests=len(records),
        rate=len(records) / window_s,
        statuses=dict(Counter(record.status for record in records)),
        attainment=kept / len(records),
        attainment_admitted=sum(record.kept for record in admitted) / len(admitted) if admitted else None,
        ttft_attainment=_share([record.ttft_kept for record in records]),
        tpot_attainment=_share([record.tpot_kept for record in records]),
        goodput=kept / window_s,
        output_tokens_per_s=tokens / span_s,
        prompt_tokens_per_s=sum(record.planned.prompt_tokens for record in served) / span_s,
        tokens_per_event=tokens / events if events else None,
        ttft_ms=distribution([record.ttft_ms for record in records]),
        tpot_ms=distribution([record.tpot_ms for record in records]),
        itl_ms=distribution([gap for record in records for gap in record.gaps_ms]),
        total_ms=distribution([record.total_ms for record in records if record.finished is not None]),
        refusals=Refusals(len(refused), distribution([record.total_ms for record in refused]), short),
        ttft_promise=_promise(records, "ttft_ms", lambda record: not record.stamps),
        tpot_promise=_promise(records, "tpot_ms", lambda record: record.status != OK),
        cross_check=_cross_check(records),
        cached_prompt_share=cached_prompt_share(records),
    )


def by_class(records: Sequence[Record], window_s: float, begin_s: float = 0.0) -> dict[str, Summary]:
    """The summary of each class that has a request, sorted by name."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record.planned.traffic.name, []).append(record)
    return {name: summarize(groups[name], window_s, begin_s) for name in sorted(groups)}


def _share(outcomes: Sequence[bool | None]) -> float | None:
    known = [outcome for outcome in outcomes if outcome is not None]
    return sum(known) / len(known) if known else None


def _promise(records: Sequence[Record], name: str, is_broken: Callable[[Record], bool]) -> Promise | None:
    """For `name` ttft_ms or tpot_ms, which has its prediction in `Accepted`."""
    promised_of = attrgetter(f"predicted_{name}")
    made = [
        (promise, getattr(record, name), is_broken(record))
        for record in records
        if record.accepted and (promise := promised_of(record.accepted))
    ]
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


def _cross_check(records: Sequence[Record]) -> CrossCheck:
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
    """The share of finished requests' prompt tokens that the server had in a prefix cache."""
    usages = [record.finished.usage for record in records if record.finished is not None]
    prompts = sum(usage.prompt_tokens for usage in usages)
    return sum(usage.cached_prompt_tokens for usage in usages) / prompts if prompts else None
