"""Records and runs made by hand, for tests of what is computed from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from baton.bench.schedule.classes import TrafficClass
from baton.bench.schedule.config import LoadConfig
from baton.bench.schedule.plan import LoadPlan, Planned
from baton.bench.sending.driver import LoadRun
from baton.bench.sending.probe import ClientLoad, Second
from baton.bench.sending.records import OK, Record
from baton.client.types import Accepted, Finished, FinishReason, Path, SloOutcome, Timeline, Usage

TTFT_ONLY = TrafficClass("all", ttft_ms=100.0)


def finished(
    ttft_ms: float = 50.0, tpot_ms: float | None = 10.0, slo: SloOutcome | None = None, cached: int = 0
) -> Finished:
    """As the router tells it."""
    timeline = Timeline(
        ttft_ms=ttft_ms, tpot_ms=tpot_ms, total_ms=100.0, router_ms=1.0, queue_ms=2.0, prefill_ms=40.0,
        transfer_ms=1.0, transfer_exposed_ms=0.0, first_step_wait_ms=1.0, decode_ms=50.0, attempts=1, handoffs=1,
        prefill_worker="prefill-0", decode_worker="decode-0", path=Path.DISAGGREGATED, transport="shm",
        transfer_bytes=1, transfer_blocks=1, transfer_cached_blocks=0,
    )  # fmt: skip
    return Finished(FinishReason.LENGTH, Usage(100, 3, cached), timeline, slo)


def record(
    at_s: float = 0.0,
    stamps: Sequence[float] = (),
    *,
    sent_s: float | None = None,
    end_s: float | None = None,
    status: str = OK,
    traffic: TrafficClass | None = None,
    **more: Any,
) -> Record:
    """One token per stamp; `stamps` in seconds after the start of the run. Ended well unless told otherwise."""
    planned = Planned(0, at_s, 100, max(1, len(stamps)), traffic or TrafficClass())
    sent_s = at_s if sent_s is None else sent_s
    end_s = end_s if end_s is not None else (stamps[-1] if stamps else at_s)
    if status == OK:
        more = {"accepted": accepted(), "finished": finished()} | more
    return Record(planned, sent_s, list(stamps), [1] * len(stamps), end_s, status, **more)


def accepted(ttft_ms: float | None = None, tpot_ms: float | None = None) -> Accepted:
    """With a promise, or without."""
    return Accepted("r", "tiny", 1, 100, 3, ttft_ms, tpot_ms)


def run_of(records: Sequence[Record], *, end_s: float = 10.0, client: ClientLoad | None = None) -> LoadRun:
    """A run without a warm-up."""
    plan = LoadPlan(tuple(entry.planned for entry in records), end_s)
    return LoadRun(plan, tuple(records), client or client_load([0.1], [0.1]))


def client_load(lags_ms: Sequence[float], loop: Sequence[float], process: float = 0.2, cores: int = 2) -> ClientLoad:
    """Of a run that began at 0; a second for each of the loop's shares."""
    return ClientLoad(list(lags_ms), [Second(1.0 + at, share, process) for at, share in enumerate(loop)], cores)


def config(**settings: Any) -> LoadConfig:
    """The default load but for these."""
    return LoadConfig(**settings)
