"""Judges whether a run measured the server or the client, with warnings for its reader."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from baton.bench.figures.metrics import CrossCheck, Distribution, cached_prompt_share, distribution
from baton.bench.schedule.config import LoadConfig
from baton.bench.sending.driver import LoadRun

WARN_LATE_MS = 5.0
WARN_SHARE, MOST_SHARE = 0.7, 0.95
"""Of one core for the loop, of all cores for the process."""
WARN_DIFFERENCE_MS = 20.0
WARN_CACHED = 0.01
"""Cached share of the tokens of prompts that share nothing."""
CLOCK_NOISE_MS = 2.0


@dataclass(frozen=True, slots=True)
class ClientHealth:
    """How late this client sent, how late its loop ran, and how busy it was while requests were due. Shares of one core
    used by the loop's thread and by the whole process, on average and in the busiest second."""

    late_ms: Distribution | None
    lag_ms: Distribution | None
    loop_share_mean: float
    loop_share_max: float
    process_share_mean: float
    process_share_max: float
    cores: int


@dataclass(frozen=True, slots=True)
class Verdict:
    """`valid` is False if the client, not the server, decided on the figures."""

    valid: bool
    warnings: tuple[str, ...]


def health_of(run: LoadRun) -> ClientHealth:
    """Over the whole run with its warm-up; the shares leave out the time after the last request was due."""
    client = run.client
    due = [second for second in client.seconds if second.until <= run.zero + run.plan.end_s] or client.seconds
    loop, process = [second.loop_share for second in due], [second.process_share for second in due]
    return ClientHealth(
        distribution([record.late_ms for record in run.records]),
        distribution(client.lags_ms),
        statistics.fmean(loop or [0.0]),
        max(loop, default=0.0),
        statistics.fmean(process or [0.0]),
        max(process, default=0.0),
        client.cores,
    )


def judge(run: LoadRun, health: ClientHealth, check: CrossCheck, config: LoadConfig) -> Verdict:
    """Invalid with more than `max_late_ms` at the 99th percentile of sends or timers, a full loop or full cores."""
    valid, warnings = True, []
    for what, found in (("requests were sent", health.late_ms), ("the event loop ran", health.lag_ms)):
        if found is not None and found.p99 > WARN_LATE_MS:
            warnings.append(f"client: 1 % of the time {what} more than {found.p99:.1f} ms late")
            valid = valid and found.p99 <= config.max_late_ms
    if health.loop_share_max > WARN_SHARE:
        warnings.append(f"client: its event loop used {health.loop_share_max:.0%} of a core in its busiest second")
        valid = valid and health.loop_share_mean <= MOST_SHARE
    if health.process_share_max > WARN_SHARE * health.cores:
        cores = "its core" if health.cores == 1 else f"its {health.cores} cores"
        share = health.process_share_max / health.cores
        warnings.append(f"client: it used {share:.0%} of {cores} in its busiest second")
        valid = valid and health.process_share_mean <= MOST_SHARE * health.cores
    if not valid:
        warnings.insert(0, "INVALID: the client was the bottleneck; send less, or give it more of the processor")
    return Verdict(valid, tuple(warnings + _notes(run, check)))


def _notes(run: LoadRun, check: CrossCheck) -> list[str]:
    notes = []
    if run.plan.clipped:
        notes.append(f"{run.plan.clipped} requests were shortened to fit the model's context")
    later_ms = 0.0 if check.ttft_difference_ms is None else check.ttft_difference_ms.p50
    if later_ms > WARN_DIFFERENCE_MS:
        notes.append(f"the client saw first tokens {later_ms:.1f} ms later than the router (median)")
    if later_ms < -CLOCK_NOISE_MS:
        notes.append(f"the router reports first tokens {-later_ms:.1f} ms later than the client saw them (median)")
    cached = cached_prompt_share(run.records)
    if cached is not None and cached > WARN_CACHED and not any(record.planned.blocks for record in run.records):
        notes.append(
            f"{cached:.0%} of the prompts' tokens were in a prefix cache, from a run with the same --seed: use another"
        )
    if check.disagreements:
        notes.append(f"client and server disagree on {check.disagreements} kept objectives")
    if not any(record.stamps for record in run.records):
        notes.append("no request got a token")
    return notes
