"""kill -9, and SIGSTOP then SIGCONT, of either side at each step of a handoff, between real processes.

Whatever dies or freezes: the other side says so within its deadline, what was granted comes back once there is proof
and not before, the sequence is served elsewhere or again, and every byte that a decode step reads is the right one:
the counting engine compares all of a sequence's KV at each step, so an old writer that still wrote into a block that
another sequence got would be seen.
"""

from __future__ import annotations

import signal

import pytest

from baton.spec import SequenceSpec
from baton.v1 import worker_pb2 as wire
from tests.faults.harness import BLOCKS, KINDS, PROMPT_BLOCKS, Workers, workers
from tests.faults.stopping import Step
from tests.roles.counting import LAYOUT
from tests.rpc.waiting import until

STEPS = (Step.AFTER_GRANT, Step.MID_BLOCK, Step.BETWEEN_CHUNKS, Step.BEFORE_COMMIT, Step.AFTER_COMMIT)
ORDINARY = {
    "kill writer": {("shm", Step.MID_BLOCK), ("tcp", Step.AFTER_GRANT), ("shm", Step.AFTER_COMMIT)},
    "freeze writer": {("shm", Step.MID_BLOCK), ("tcp", Step.MID_BLOCK), ("shm", Step.BEFORE_COMMIT)},
    "kill receiver": {("shm", Step.BETWEEN_CHUNKS), ("tcp", Step.MID_BLOCK), ("tcp", Step.AFTER_COMMIT)},
    "freeze receiver": {("tcp", Step.BETWEEN_CHUNKS), ("shm", Step.AFTER_GRANT)},
}
"""What every test run has of the matrix; the night has all."""
GONE = {wire.REFUSAL_REASON_UNREACHABLE, wire.REFUSAL_REASON_EXPIRED}


def cells(fault: str) -> list[object]:
    """One parameter set for each transport and step."""
    return [
        pytest.param(
            kind,
            step,
            id=f"{kind}-{step.value.replace(' ', '-')}",
            marks=() if (kind, step) in ORDINARY[fault] else pytest.mark.nightly,
        )
        for kind in KINDS
        for step in STEPS
    ]


async def stopped_at(w: Workers, step: Step, *others: str) -> SequenceSpec:
    """p0 hands a sequence over to d0, and both stand at the step."""
    held_by_wire = w.kind == "tcp" and step is Step.MID_BLOCK
    on_decode = step is Step.AFTER_COMMIT
    w.add("p0", None if on_decode or held_by_wire else step)
    w.add("d0", step if on_decode else None)
    for name in others:
        w.add(name)
    await w.start(proxied=held_by_wire)
    if w.wire is not None:
        w.wire.hold_after = LAYOUT.block_bytes * 3 // 2
    spec = w.spec()
    await w.begin(spec, "p0", "d0")
    if w.wire is not None:
        await until(w.wire.held.is_set, "half of a block")
    else:
        await w["d0" if on_decode else "p0"].at(step)
    return spec


def go_on(w: Workers, step: Step) -> None:
    """Releases whatever stands at the step."""
    if w.wire is not None:
        w.wire.release()
    else:
        w["d0" if step is Step.AFTER_COMMIT else "p0"].go()


@pytest.mark.parametrize(("kind", "step"), cells("kill writer"))
async def test_a_killed_writers_blocks_come_back_once_there_is_proof(kind: str, step: Step) -> None:
    async with workers(kind) as w:
        spec = await stopped_at(w, step, "p1")
        w["p0"].signal(signal.SIGKILL)
        if step is Step.AFTER_COMMIT:
            go_on(w, step)
            await w.ended(spec, "d0")
        found = await w["d0"].idle()
        if step is Step.AFTER_COMMIT:
            assert found.aborts == []
        else:
            proof = "UNREACHABLE: the sender's process has ended" if kind == "shm" else "EXPIRED: the sender's lease"
            assert len(found.aborts) == 1
            assert found.aborts[0].startswith(proof)
        await w.whole_pool("p1", "d0")
        await w["d0"].idle()


@pytest.mark.parametrize(("kind", "step"), cells("freeze writer"))
async def test_a_frozen_writer_that_wakes_up_writes_into_no_others_block(kind: str, step: Step) -> None:
    async with workers(kind) as w:
        spec = await stopped_at(w, step, "p1")
        w["p0"].signal(signal.SIGSTOP)
        if step is Step.AFTER_COMMIT:
            go_on(w, step)
            await w.ended(spec, "d0")
            w["p0"].signal(signal.SIGCONT)
            w.router.cancel(w["p0"], spec)  # its lease ran out meanwhile, so it may not believe in its success
        else:
            await thaw_into_a_full_pool(w, spec, step)
        await w.router.attach_again(w["p0"])
        await w["p0"].idle()
        await w["d0"].idle()
        await w.whole_pool("p0", "d0")


async def thaw_into_a_full_pool(w: Workers, spec: SequenceSpec, step: Step) -> None:
    """While the writer is frozen others take every block that they can get; then it wakes up and writes."""
    d0 = w["d0"]
    found = await d0.until(lambda report: report.aborts, "to give the grant up")
    assert found.aborts[0].startswith("EXPIRED: the sender's lease ran out")
    if w.kind == "tcp":  # the revocation is the proof
        found = await d0.until(lambda report: not report.quarantined, "to have the proof")
    quarantined = 0 if w.kind == "tcp" else PROMPT_BLOCKS
    assert (found.quarantined, found.available) == (quarantined, BLOCKS - quarantined)

    guard = await guarded(w, found.available)
    waiting = await asked(w)
    assert (await d0.report()).quarantined == quarantined, "time is no proof"

    w["p0"].signal(signal.SIGCONT)
    go_on(w, step)
    assert (await w.failed(spec, "p0")).reason in GONE
    await d0.until(lambda report: not report.quarantined, "to have the proof")
    await d0.ask("gate", True)
    await w.ended(guard, "d0")  # each of its steps has read all of its blocks
    await w.ended(waiting, "d0")
    await w.router.attach_again(w["p0"])
    await w.carry_on(spec, "p0", "d0", 2)


async def guarded(w: Workers, blocks: int) -> SequenceSpec:
    """A sequence of p1's in so many blocks of d0: resident, and its steps are yet to come."""
    await w["d0"].ask("gate", False)
    guard = w.spec(blocks * LAYOUT.block_tokens - 40, 40)
    await w.begin(guard, "p1", "d0")
    await w.router.hears(w["d0"], "resident", guard)
    return guard


async def asked(w: Workers) -> SequenceSpec:
    """One more of p1's, which waits for room."""
    spec = w.spec(20)
    await w.begin(spec, "p1", "d0")
    await w.router.hears(w["p1"], "handoff_waiting", spec)
    return spec


@pytest.mark.parametrize(("kind", "step"), cells("kill receiver"))
async def test_a_killed_receivers_sequence_is_served_elsewhere(kind: str, step: Step) -> None:
    async with workers(kind) as w:
        spec = await stopped_at(w, step, "d1")
        w["d0"].signal(signal.SIGKILL)
        if step is not Step.AFTER_COMMIT:
            go_on(w, step)
        failed = await w.failed(spec, "p0")
        assert failed.reason == wire.REFUSAL_REASON_UNREACHABLE
        assert any(said in failed.message for said in ("d0", "the control stream ended"))
        await w.carry_on(spec, "p0", "d1", 2)
        await w["p0"].idle()
        await w["d1"].idle()


@pytest.mark.parametrize(("kind", "step"), cells("freeze receiver"))
async def test_a_frozen_receivers_sequence_is_served_elsewhere(kind: str, step: Step) -> None:
    async with workers(kind) as w:
        spec = await stopped_at(w, step, "d1")
        w["d0"].signal(signal.SIGSTOP)
        go_on(w, step)
        assert (await w.failed(spec, "p0")).reason in GONE
        await w.carry_on(spec, "p0", "d1", 2)
        w.router.cancel(w["d0"], spec)  # as a router does that moves on from a worker which may hold something
        w["d0"].signal(signal.SIGCONT)
        await w.router.attach_again(w["d0"])
        for name in ("p0", "d0", "d1"):
            await w[name].idle()
        await w.whole_pool("p0", "d0")
