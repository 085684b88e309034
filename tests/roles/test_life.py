"""The life of a request through a prefill and a decode worker."""

from __future__ import annotations

import asyncio
import time

import pytest

from baton.spec import FinishReason, HandoffKey, Sampling
from baton.v1 import worker_pb2 as wire
from tests.roles.conftest import Cluster
from tests.roles.counting import LAYOUT, continuation
from tests.rpc.waiting import WAIT_S, until

BLOCK = LAYOUT.block_tokens


@pytest.mark.parametrize("kind", ["memory", "tcp", "shm"])
@pytest.mark.parametrize("prompt", [1, 16, 17, 100])
async def test_a_request_goes_through(cluster: Cluster, kind: str, prompt: int) -> None:
    await cluster.add_prefill(kind=kind)
    await cluster.add_decode(kind=kind)
    spec = cluster.router.spec(prompt, max_tokens=20)
    ended = await cluster.serve(spec)
    assert ended.reason == FinishReason.LENGTH
    assert ended.output_tokens == 20
    assert ended.decode_ms >= 0
    report = cluster.router.heard(cluster.p, "prefill_report", spec)[0]
    blocks = LAYOUT.blocks_for(prompt)
    assert (report.transport, report.transfer_blocks, report.transfer_cached_blocks) == (kind, blocks, 0)
    assert report.transfer_bytes == blocks * LAYOUT.block_bytes
    assert report.transfer_ms > 0
    assert report.prefill_ms > 0
    assert report.cached_tokens == 0
    assert [resident.handoff for resident in cluster.router.heard(cluster.d, "resident", spec)] == [1]


async def test_decode_repeats_the_first_token(pair: Cluster) -> None:
    spec = pair.router.spec(20, max_tokens=3, sampling=Sampling(temperature=0.0, logprobs=1))
    await pair.serve(spec)
    assert list(pair.router.tokens(pair.p, spec)) == [20]
    assert list(pair.router.tokens(pair.d, spec)) == [20, 21, 22]
    runs = [run for f in pair.router.links["d0"].frames for run in f.tokens.runs if run.attempt == spec.attempt]
    assert all(len(run.logprobs) == 1 and run.logprobs[0].top[0].id == 7 for run in runs)


async def test_output_of_earlier_attempts_is_context_and_counts(pair: Cluster) -> None:
    spec = pair.router.spec(20, max_tokens=8, output=(5, 6, 7))
    ended = await pair.serve(spec)
    assert ended.output_tokens == 8
    assert min(pair.router.tokens(pair.p, spec)) == 23


async def test_many_at_once(cluster: Cluster) -> None:
    await cluster.add_prefill(kind="tcp", blocks=40, chunk_tokens=48)
    await cluster.add_decode(kind="tcp", blocks=80, max_sequences=4)
    specs = [cluster.router.spec(3 + 17 * i % 90, max_tokens=2 + i % 7) for i in range(24)]

    async def life(number: int) -> None:
        spec, handoff = specs[number], 1
        await cluster.bound(spec)
        while not cluster.router.heard(cluster.d, "ended", spec):
            if len(cluster.router.heard(cluster.p, "handoff_failed", spec)) == handoff:
                handoff += 1
                cluster.router.bind(cluster.p, spec, cluster.d, handoff)
            await asyncio.sleep(0.005)
        await cluster.finished(spec)

    await asyncio.gather(*map(life, range(len(specs))))


async def test_cached_blocks_are_neither_computed_nor_sent(pair: Cluster) -> None:
    first = pair.router.spec(5 * BLOCK + 3, max_tokens=2)
    await pair.serve(first)
    again = pair.router.spec([*first.prompt, 1, 2, 3], max_tokens=3)
    await pair.serve(again)
    report = pair.router.heard(pair.p, "prefill_report", again)[0]
    assert pair.router.heard(pair.p, "started", again)[0].cached_tokens == report.cached_tokens == 5 * BLOCK
    assert report.transfer_cached_blocks == 5
    assert report.transfer_blocks == 1


async def test_a_full_hit_recomputes_the_last_token(pair: Cluster) -> None:
    first = pair.router.spec(4 * BLOCK, max_tokens=2)
    await pair.serve(first)
    again = pair.router.spec(list(first.prompt), max_tokens=2)
    await pair.serve(again)
    report = pair.router.heard(pair.p, "prefill_report", again)[0]
    assert report.cached_tokens == 3 * BLOCK  # the last block is computed anew: no sequence writes into a shared one
    assert (report.transfer_cached_blocks, report.transfer_blocks) == (4, 0)


async def test_the_next_turn_finds_the_output_on_the_decode_worker(pair: Cluster) -> None:
    first = pair.router.spec(BLOCK - 2, max_tokens=2 * BLOCK)
    await pair.serve(first)
    history = [*first.prompt, *pair.router.expected(first)]
    again = pair.router.spec([*history, 9], max_tokens=2)
    await pair.serve(again)
    report = pair.router.heard(pair.p, "prefill_report", again)[0]
    assert report.cached_tokens == 0  # the prefill worker never saw the output
    assert report.transfer_cached_blocks == (len(history) - 1) // BLOCK


async def test_another_tenant_finds_nothing(pair: Cluster) -> None:
    first = pair.router.spec(3 * BLOCK, max_tokens=2)
    await pair.serve(first)
    other = pair.router.spec(list(first.prompt), max_tokens=2, tenant_salt="other")
    await pair.serve(other)
    report = pair.router.heard(pair.p, "prefill_report", other)[0]
    assert (report.cached_tokens, report.transfer_cached_blocks) == (0, 0)


async def test_chunks_arrive_before_the_prompt_is_computed(pair: Cluster) -> None:
    """The engine waits before the last chunk until the blocks of the former ones have landed."""
    landed: list[int] = []
    place = pair.d.role.handoffs.landed

    def landing(key: HandoffKey, generation: int, indices: tuple[int, ...]) -> None:
        landed.extend(indices)
        place(key, generation, indices)

    def before_step(number: int) -> None:
        deadline = time.monotonic() + WAIT_S
        while number == 2 and len(landed) < 4 and time.monotonic() < deadline:
            time.sleep(0.002)
        seen.append(len(landed))

    seen: list[int] = []
    pair.d.role.handoffs.landed = landing  # type: ignore[method-assign,assignment]
    pair.p.engine.before_step = before_step
    spec = pair.router.spec(6 * BLOCK)
    await pair.serve(spec)
    assert seen[2] == 4
    assert landed == list(range(6))


async def test_late_bind(pair: Cluster) -> None:
    """Bound only after the prompt is computed and its first token is out."""
    spec = pair.router.spec(70, max_tokens=5)
    await pair.started(spec)
    await until(lambda: pair.router.tokens(pair.p, spec), "the first token")
    assert pair.p.busy().get("attempts") == 1
    pair.router.bind(pair.p, spec, pair.d)
    await pair.finished(spec)
    assert pair.router.heard(pair.p, "prefill_report", spec)[0].transfer_exposed_ms > 0


@pytest.mark.parametrize("bind", [False, True])
@pytest.mark.parametrize("end", ["eos", "stop", "length"])
async def test_ends_on_the_first_token(pair: Cluster, end: str, bind: bool) -> None:
    """The prefill worker finishes the request itself; where a decode worker was bound, its grant is closed."""
    prompt = [*range(40)]
    (token,) = continuation(prompt, 1)
    fields = {"eos": {"eos_token_ids": frozenset({token})}, "stop": {"stop_token_ids": frozenset({token})}}
    spec = pair.router.spec(prompt, max_tokens=1 if end == "length" else 9, **fields.get(end, {}))
    pair.p.engine.gate.clear()
    await pair.started(spec)
    if bind:
        pair.router.bind(pair.p, spec, pair.d)
        await until(lambda: pair.d.role.live["grants"], "the grant")
    pair.p.engine.gate.set()
    ended = await pair.router.hears(pair.p, "ended", spec)
    reasons = {"eos": FinishReason.EOS, "stop": FinishReason.STOP_TOKEN, "length": FinishReason.LENGTH}
    assert (ended.reason, ended.output_tokens) == (reasons[end], 1)
    assert pair.router.output(spec) == [token]
    assert len(pair.router.heard(pair.p, "prefill_report", spec)) == 1
    await pair.idle()
    assert pair.router.heard(pair.d, "resident", spec) == []
    assert pair.router.heard(pair.p, "handoff_failed", spec) == []


@pytest.mark.parametrize("end", ["eos", "stop"])
async def test_ends_on_a_later_token(pair: Cluster, end: str) -> None:
    prompt = [*range(7, 40)]
    output = continuation(prompt, 6)
    assert output[5] not in output[:5]
    field = {"eos": "eos_token_ids", "stop": "stop_token_ids"}[end]
    spec = pair.router.spec(prompt, max_tokens=50, **{field: frozenset({output[5]})})
    ended = await pair.serve(spec)
    assert ended.output_tokens == 6
    assert ended.reason == {"eos": FinishReason.EOS, "stop": FinishReason.STOP_TOKEN}[end]


async def test_one_frame_carries_a_step_of_all_sequences(pair: Cluster) -> None:
    specs = [pair.router.spec(5 + n, max_tokens=30) for n in range(4)]
    pair.d.engine.gate.clear()
    for spec in specs:
        await pair.bound(spec)
        await pair.router.hears(pair.d, "resident", spec)
    pair.d.engine.gate.set()
    for spec in specs:
        await pair.finished(spec)
    assert max(len(frame.tokens.runs) for frame in pair.router.links["d0"].frames) == 4


async def test_load_is_reported(pair: Cluster) -> None:
    spec = pair.router.spec(40, max_tokens=3)
    await pair.serve(spec)

    def reports(name: str) -> list[wire.LoadReport]:
        return [frame.load for frame in pair.router.links[name].frames if frame.HasField("load")]

    for name in ("p0", "d0"):
        await until(lambda name=name: reports(name) and reports(name)[-1].cached_blocks == 2, "a report")  # type: ignore[misc]
        last = reports(name)[-1]
        assert (last.waiting, last.running, last.waiting_tokens) == (0, 0, 0)
        assert last.free_blocks + last.cached_blocks == 64
        assert last.held_blocks == 0
        assert last.cost.chunk_tokens == 32


async def test_what_is_granted_is_reported_until_it_is_resident(pair: Cluster) -> None:
    """A router has it in its books as bound: it must not take it off once more."""
    pair.p.engine.gate.clear()
    spec = pair.router.spec(40, max_tokens=30)
    blocks = LAYOUT.blocks_for(spec.kv_tokens)

    def granted() -> int:
        return [frame.load for frame in pair.router.links["d0"].frames if frame.HasField("load")][-1].granted_blocks

    await pair.bound(spec)
    await until(lambda: granted() == blocks, "the grant in a report")
    pair.p.engine.gate.set()
    await pair.finished(spec)
    await until(lambda: granted() == 0, "none on the way")
