"""The driver against a server whose pace is known."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import psutil
import pytest

from baton import errors
from baton.bench.figures.metrics import summarize
from baton.bench.measuring import measure_once
from baton.bench.schedule.plan import LoadPlan, Planned, make_plan
from baton.bench.sending.driver import LoadRun, Progress, connect, run_plan
from baton.rpc.status import from_rpc_error
from tests.bench.builders import config
from tests.bench.paced import Paced
from tests.client.double import serving
from tests.rpc.waiting import until


@asynccontextmanager
async def paced(**pace: float) -> AsyncIterator[Paced]:
    double = Paced(**pace)  # type: ignore[arg-type]
    async with serving(double):
        yield double


async def sent(address: str, plan: LoadPlan, **settings: object) -> LoadRun:
    load = config(**settings)
    async with connect(address, load) as target:
        return await run_plan(target, plan, load)


def even(count: int, every_s: float, tokens: int = 3) -> LoadPlan:
    requests = tuple(Planned(index, index * every_s, 8, tokens) for index in range(count))
    return LoadPlan(requests, count * every_s)


async def test_every_request_goes_out_as_planned() -> None:
    load = config(
        rate=200.0, seconds=0.5, prompt_tokens="uniform:3:9", output_tokens="uniform:1:4", classes=["a:1:tpot_ms=9"]
    )
    async with paced() as server:
        measured, run = await measure_once(server.address, load)
    plan = make_plan(load, 64)
    assert run.plan == plan
    by_length = sorted(
        (len(request.token_ids.ids), request.stopping.max_tokens, request.slo.tpot_ms) for request in server.requests
    )
    assert by_length == sorted((entry.prompt_tokens, entry.output_tokens, 9.0) for entry in plan.requests)
    assert all(request.stopping.ignore_eos and request.model == "tiny" for request in server.requests)
    assert {record.status for record in run.records} == {"OK"}
    assert [record.output_tokens for record in run.records] == [entry.output_tokens for entry in plan.requests]
    assert measured.summary.statuses == {"OK": len(plan.requests)}


async def test_a_server_that_never_answers_does_not_slow_the_sending() -> None:
    async with paced(ttft_s=60.0) as server:
        run = await sent(server.address, even(40, 0.01), timeout_s=0.6)
    assert len(server.requests) == 40
    assert {record.status for record in run.records} == {"DEADLINE_EXCEEDED"}
    assert summarize(run.records, run.plan.window_s).attainment == 0.0


async def test_waiting_behind_others_counts_from_when_a_request_was_due() -> None:
    """One slot of 50 ms, a request every 10 ms: the n-th waits for all before it."""
    async with paced(ttft_s=0.05, gap_s=0.0, slots=1) as server:
        run = await sent(server.address, even(10, 0.01, tokens=1))
    waits = [record.ttft_ms for record in run.records]
    for index, wait in enumerate(waits):
        assert wait is not None
        assert wait >= 50 * (index + 1) - 10 * index - 5


async def test_a_client_that_hangs_counts_that_against_itself() -> None:
    """The loop stands still for 0.3 s while ten requests are due: they are late, slow, and the run is invalid."""

    async def hang() -> None:
        await until(lambda: len(server.requests) >= 10, "ten requests")
        time.sleep(0.3)  # noqa: ASYNC251  the fault that is tested

    async with paced() as server:
        hanging = asyncio.create_task(hang())
        measured, run = await measure_once(server.address, config(rate=50.0, burstiness=0.0, seconds=1.0))
        await hanging
    late = [record for record in run.records if record.late_ms > 100]
    assert late
    assert all(record.ttft_ms is not None and record.ttft_ms > record.late_ms for record in late)
    assert not measured.verdict.valid
    assert measured.verdict.warnings[0].startswith("INVALID")


async def test_refusals_have_their_answer_time_and_their_reason() -> None:
    async def serve_when_all_have_come() -> None:
        await until(lambda: len(server.requests) >= 10, "ten requests")
        for _ in range(10):
            server.slots.release()

    async with paced(slots=0) as server:
        server.refuse_beyond = 3
        serving_later = asyncio.create_task(serve_when_all_have_come())
        run = await sent(server.address, even(10, 0.005))
        await serving_later
    found = summarize(run.records, run.plan.window_s)
    assert found.refusals.count == 6
    assert found.refusals.constraints == {"ttft": 6}
    assert found.refusals.answer_ms is not None
    assert found.attainment == pytest.approx(0.4)
    assert found.attainment_admitted == 1.0


async def test_errors_are_told_by_status() -> None:
    async with paced() as server:
        server.error = errors.InvalidArgument("token_ids", "too long")
        run = await sent(server.address, even(3, 0.005))
    assert [(record.status, record.message) for record in run.records] == 3 * [
        ("INVALID_ARGUMENT", "token_ids: too long")
    ]


async def test_a_stream_without_a_result_is_incomplete() -> None:
    async with paced() as server:
        server.silent = True
        run = await sent(server.address, even(2, 0.005))
    assert {record.status for record in run.records} == {"INCOMPLETE"}
    assert not any(record.kept for record in run.records)


async def test_promises_are_kept_with_the_records() -> None:
    async with paced(ttft_s=0.05) as server:
        server.promise_ms = 1000.0
        run = await sent(server.address, even(5, 0.01))
    promise = summarize(run.records, run.plan.window_s).ttft_promise
    assert promise is not None
    assert (promise.count, promise.kept_share) == (5, 1.0)
    assert promise.promised_over_achieved_p50 > 1


async def test_many_streams_share_a_fixed_number_of_connections() -> None:
    async with paced(ttft_s=1.0) as server:
        port = int(server.address.rpartition(":")[2])
        running = asyncio.create_task(sent(server.address, even(300, 0.001), channels=3))
        await until(lambda: server.under_way >= 250, "250 streams")
        ends = [link for link in psutil.Process().net_connections("tcp") if link.raddr and link.raddr.port == port]
        assert len(ends) == 3
        run = await running
    assert {record.status for record in run.records} == {"OK"}


async def test_the_warm_up_is_sent_and_not_counted() -> None:
    load = config(rate=50.0, burstiness=0.0, seconds=0.6, warmup_s=0.3)
    async with paced() as server:
        measured, run = await measure_once(server.address, load)
    assert len(run.records) == 29
    assert measured.summary.requests == 15
    assert measured.summary.rate == pytest.approx(50.0)


async def test_progress_comes_while_it_runs_and_ends_complete() -> None:
    seen: list[Progress] = []
    load = config(rate=40.0, burstiness=0.0, seconds=1.2, prompt_tokens="8")
    async with paced() as server:
        await measure_once(server.address, load, lambda where: seen.append(Progress(**_fields(where))))
    assert len(seen) >= 2
    assert 0 < seen[0].sent <= seen[-1].sent
    assert (seen[-1].ended, seen[-1].sent, seen[-1].tokens) == (47, 47, 47 * 32)


def _fields(where: Progress) -> dict[str, int]:
    return {name: getattr(where, name) for name in Progress.__dataclass_fields__}


async def test_an_absent_server_and_an_unknown_model_are_named() -> None:
    with pytest.raises(errors.Unavailable, match=r"cannot reach 127\.0\.0\.1:1"):
        await measure_once("127.0.0.1:1", config())
    async with paced() as server:
        with pytest.raises(errors.ConfigError, match="model: 'huge' is not served; there is tiny"):
            await measure_once(server.address, config(model="huge"))


async def test_what_failures_say_is_read_when_nothing_is_under_way_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading one would delay what is stamped after it."""
    under_way: list[int] = []
    progress = Progress(0)

    def reading(error: grpc.aio.AioRpcError) -> errors.BatonError:
        under_way.append(progress.sent - progress.ended)
        return from_rpc_error(error)

    def watch(now: Progress) -> None:
        nonlocal progress
        progress = now

    monkeypatch.setattr("baton.bench.sending.driver.from_rpc_error", reading)
    async with paced(ttft_s=60.0) as server:
        load = config(timeout_s=0.8)
        async with connect(server.address, load) as target:
            run = await run_plan(target, even(5, 0.01), load, watch)
    assert under_way == [0] * 5
    assert [record.status for record in run.records] == ["DEADLINE_EXCEEDED"] * 5
