"""The load generator on a real cluster: its figures hold together, prefixes are shared, and a stopped worker shows."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path

import pytest

from baton.bench.measuring import measure_once
from baton.bench.schedule.plan import LoadPlan, Planned
from baton.bench.sending.driver import connect, run_plan
from tests.bench.builders import config
from tests.bench.stalls import Watched, stalled
from tests.cluster.conftest import Running, settled
from tests.rpc.waiting import until

pytestmark = pytest.mark.asyncio(loop_scope="package")

STALL_S = 1.0
"""Far longer than any gap between two tokens of a cluster that runs."""


async def test_a_mooncake_replay_shares_its_prefixes_and_agrees_with_the_timelines(
    plain: Running, tmp_path: Path
) -> None:
    """Six prompts of 128 tokens that share their first 96, one after the other at 2 a second."""
    rows = [
        {"timestamp": 500 * index, "input_length": 2048, "output_length": 192, "hash_ids": [1, 2, 3, 10 + index]}
        for index in range(6)
    ]
    trace = tmp_path / "trace.jsonl"
    trace.write_text("\n".join(map(json.dumps, rows)))
    load = config(trace=trace, length_scale=1 / 16, slo="ttft_ms=60000,tpot_ms=60000")
    measured, run = await measure_once(plain.cluster.address, load)
    summary = measured.summary
    assert summary.statuses == {"OK": 6}
    assert (summary.attainment, summary.cross_check.disagreements) == (1.0, 0)
    assert [record.output_tokens for record in run.records] == 6 * [12]
    usages = [record.finished.usage for record in run.records if record.finished]
    assert [usage.prompt_tokens for usage in usages] == 6 * [128]
    assert usages[0].cached_prompt_tokens == 0
    assert usages[-1].cached_prompt_tokens == 96
    for record in run.records:
        assert record.finished is not None
        seen_ms = (record.stamps[0] - record.sent_s) * 1e3
        assert seen_ms >= record.finished.timeline.ttft_ms - 1, "no client sees a token before the router sends it"
    await settled(plain)


async def test_a_stopped_decode_worker_shows_in_every_stream_at_its_true_length(plain: Running) -> None:
    worker = next(child for child in plain.cluster.processes if child.role == "decode")
    plan = LoadPlan(tuple(Planned(index, 0.0, 32, 250) for index in range(4)), 1.0)
    load = config(timeout_s=60.0)
    watched = Watched()
    async with connect(plain.cluster.address, load) as target:
        running_load = asyncio.create_task(run_plan(target, plan, load, watched))
        await watched.until(lambda now: now.tokens > 40, "all streams run")
        async with stalled(worker.pid) as stall:
            await until(lambda: time.perf_counter() >= stall.stopped + STALL_S, "the stall is that long")
        run = await running_load
    for record in run.records:
        assert record.status == "OK"
        assert record.stamps[-1] + run.zero > stall.going, "it was under way during the stall"
        assert stall.at_least_ms - 20 <= max(record.gaps_ms) <= stall.at_least_ms + 1500
    await settled(plain)
