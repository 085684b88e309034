"""What the load generator measures is so: against an independent client, and against a stall of known length."""

from __future__ import annotations

import asyncio
import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from baton.bench.figures.metrics import summarize
from baton.bench.schedule.plan import LoadPlan, Planned
from baton.bench.sending.driver import connect, run_plan
from tests.bench.builders import config
from tests.bench.paced import pacing
from tests.bench.stalls import Watched, stalled
from tests.rpc.waiting import until

PROTO = Path(__file__).parents[2] / "proto"
INDEPENDENT = """
import json, sys, threading, time
sys.path.insert(0, sys.argv[2])
import grpc
from baton.v1 import generation_pb2 as pb, generation_pb2_grpc as rpc
import baton
assert not hasattr(baton, "__file__") or baton.__file__ is None, "the generated package only"
count, every, tokens, first = int(sys.argv[3]), float(sys.argv[4]), int(sys.argv[5]), int(sys.argv[6])
stub = rpc.GenerationStub(grpc.insecure_channel(sys.argv[1]))
stub.ListModels(pb.ListModelsRequest(), timeout=20)
results = [None] * count
begin = time.monotonic_ns() + 200_000_000
def one(index):
    due = begin + int(index * every * 1e9)
    time.sleep(max(0, due - time.monotonic_ns()) / 1e9)
    request = pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=range(300 + first + 64 * index, 364 + first + 64 * index)),
        sampling=pb.Sampling(temperature=0.0),
        stopping=pb.Stopping(max_tokens=tokens, ignore_eos=True),
    )
    stamps = []
    for event in stub.Generate(request, timeout=60):
        if event.WhichOneof("event") == "tokens":
            stamps.append(time.monotonic_ns())
    results[index] = (
        (stamps[0] - due) / 1e6, (stamps[-1] - stamps[0]) / 1e6 / (len(stamps) - 1),
        [(b - a) / 1e6 for a, b in zip(stamps, stamps[1:])],
    )
threads = [threading.Thread(target=one, args=(index,)) for index in range(count)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print(json.dumps(results))
"""


def stubs(folder: Path) -> None:
    """Generated from the wire contract alone."""
    sources = sorted(str(path.relative_to(PROTO)) for path in PROTO.rglob("*.proto"))
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{PROTO}", f"--python_out={folder}"]
    subprocess.run([*command, f"--grpc_python_out={folder}", *sources], check=True, cwd=folder, timeout=60)


async def independent(
    address: str, folder: Path, count: int, every_s: float, tokens: int, first: int = 0
) -> list[list[float]]:
    """TTFT, TPOT and all gaps of each request, in milliseconds, as a foreign program sees them.

    `first` sets its prompts off from those of another call.
    """
    libraries = [path for path in sys.path if path.endswith("site-packages")]
    program = f"import sys; sys.path[:0] = {libraries!r}\n{INDEPENDENT}"
    arguments = [address, str(folder), str(count), str(every_s), str(tokens), str(first)]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-I", "-S", "-c", program, *arguments, stdout=asyncio.subprocess.PIPE
    )
    out, _ = await process.communicate()
    assert process.returncode == 0
    found: list[list[float]] = json.loads(out)
    return found


async def both(folder: Path, address: str) -> list[tuple[float, float]]:
    """Medians of TTFT, TPOT and ITL, ours and theirs, of two loads at once."""
    count, every_s, tokens = 12, 0.12, 26
    plan = LoadPlan(tuple(Planned(index, index * every_s, 64, tokens) for index in range(count)), count * every_s)
    async with connect(address, config()) as target:
        run, theirs = await asyncio.gather(
            run_plan(target, plan, config()), independent(address, folder, count, every_s, tokens)
        )
    ours = summarize(run.records, plan.window_s)
    gaps = [gap for entry in theirs for gap in entry[2]]  # type: ignore[attr-defined]
    assert ours.ttft_ms is not None
    assert ours.tpot_ms is not None
    assert ours.itl_ms is not None
    return [
        (ours.ttft_ms.p50, statistics.median(entry[0] for entry in theirs)),
        (ours.tpot_ms.p50, statistics.median(entry[1] for entry in theirs)),
        (ours.itl_ms.p50, statistics.median(gaps)),
    ]


async def test_its_numbers_agree_with_an_independent_client_within_2_percent(tmp_path: Path) -> None:
    """Against one server of a known pace: 400 ms to the first token, 40 ms between tokens.

    A busy machine delays the two programs differently, so they get three tries; a wrong clock would fail them all.
    """
    await asyncio.to_thread(stubs, tmp_path)
    seen = []
    async with pacing(400, 40) as (address, _):
        for _ in range(3):
            seen.append(await both(tmp_path, address))
            if all(ours == pytest.approx(theirs, rel=0.02) for ours, theirs in seen[-1]):
                return
    pytest.fail(f"no agreement in three tries (ours, theirs): {seen}")


async def test_a_stall_of_the_server_shows_at_its_true_length() -> None:
    """The server is stopped while streams run and requests fall due: gaps and waits are at least as long as that."""
    plan = LoadPlan(tuple(Planned(index, index * 0.1, 16, 60) for index in range(20)), 2.0)
    watched = Watched()
    async with pacing(50, 20) as (address, pid), connect(address, config()) as target:
        running = asyncio.create_task(run_plan(target, plan, config(), watched))
        progress = await watched.until(lambda now: now.tokens > 20, "streams run")
        async with stalled(pid) as stall:
            due_then = progress.sent
            await until(lambda: progress.sent >= due_then + 6, "requests fall due meanwhile")
        run = await running
    worst = max(gap for record in run.records for gap in record.gaps_ms)
    assert stall.at_least_ms - 5 <= worst, "the whole stall lies within one gap"
    assert worst <= stall.at_most_ms + 20 + 1000, "a gap, and what a busy machine adds"
    due_meanwhile = [record for record in run.records if stall.stopped < run.zero + record.planned.at_s < stall.going]
    assert len(due_meanwhile) >= 5
    for record in due_meanwhile:
        assert record.ttft_ms is not None
        left_ms = (stall.going - run.zero - record.planned.at_s) * 1e3
        assert record.ttft_ms >= left_ms, "it waited for the rest of the stall at least: nothing is left out"
