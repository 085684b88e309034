"""A peer that breaks off, answers late, shows the wrong papers or garbles a byte: the right error, then all is well."""

from __future__ import annotations

import signal
from typing import Any

import pytest

from baton.v1 import worker_pb2 as wire
from tests.faults.harness import KINDS, PROMPT_BLOCKS, workers
from tests.faults.stopping import Step
from tests.roles.counting import LAYOUT
from tests.rpc.waiting import until

HALF_WAY = LAYOUT.block_bytes * 3 // 2
PATIENT = {"lease_s": 20.0}
"""No handoff of these tests may fail for another reason."""


async def test_a_torn_tcp_connection_fails_one_handoff_and_the_next_succeeds() -> None:
    async with workers("tcp") as w:
        w.add("p0")
        w.add("d0")
        await w.start(proxied=True)
        assert w.wire is not None
        w.wire.hold_after = HALF_WAY
        spec = w.spec()
        await w.begin(spec, "p0", "d0")
        await until(w.wire.held.is_set, "half of a block")
        w.wire.cut()
        failed = await w.failed(spec, "p0")
        assert failed.reason == wire.REFUSAL_REASON_UNREACHABLE
        assert "d0" in failed.message
        await w.carry_on(spec, "p0", "d0", 2)
        assert (await w["d0"].idle()).aborts
        await w["p0"].idle()
        await w.whole_pool("p0", "d0")


async def test_a_torn_shm_connection_fails_one_handoff_and_the_next_succeeds() -> None:
    async with workers("shm") as w:
        w.add("p0", Step.AFTER_GRANT)
        w.add("d0")
        await w.start()
        spec = w.spec()
        await w.begin(spec, "p0", "d0")
        await w["p0"].at(Step.AFTER_GRANT)
        assert await w["p0"].ask("tear") == 1
        w["p0"].go()
        failed = await w.failed(spec, "p0")
        assert failed.reason == wire.REFUSAL_REASON_UNREACHABLE
        await w.carry_on(spec, "p0", "d0", 2)
        await w["p0"].idle()
        await w["d0"].idle()
        await w.whole_pool("p0", "d0")


@pytest.mark.parametrize("kind", [pytest.param("shm", marks=pytest.mark.nightly), "tcp"])
async def test_an_answer_that_comes_late_changes_nothing(kind: str) -> None:
    """The blocks have landed, but the writer hears of it after its deadline; the news changes nothing then."""
    async with workers(kind) as w:
        w.add("p0")
        w.add("d0", Step.LATE_ANSWER)
        await w.start()
        spec = w.spec()
        await w.begin(spec, "p0", "d0")
        await w["d0"].at(Step.LATE_ANSWER)
        failed = await w.failed(spec, "p0")
        assert failed.reason == wire.REFUSAL_REASON_UNREACHABLE
        assert "in time" in failed.message
        if kind == "tcp":  # its proof comes from the very thread that is late
            found = await w["d0"].until(lambda report: report.aborts, "to give the grant up")
            assert found.quarantined == PROMPT_BLOCKS
        w["d0"].go()
        await w.carry_on(spec, "p0", "d0", 2)
        await w["p0"].idle()
        await w["d0"].idle()
        await w.whole_pool("p0", "d0")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("forged", "why"), [({"write_token": b"x" * 16}, "wrong write token"), ({"generation": 999}, "generation 999")]
)
async def test_a_write_with_the_wrong_papers_places_no_byte(kind: str, forged: dict[str, Any], why: str) -> None:
    """No byte of it is placed; the connection stays, and the next handoff uses it."""
    async with workers(kind) as w:
        w.add("p0", forge=forged)
        w.add("d0", settings=PATIENT)
        await w.start()
        before = await w["d0"].ask("contents")
        spec = w.spec()
        await w.begin(spec, "p0", "d0")
        failed = await w.failed(spec, "p0")
        assert failed.reason == wire.REFUSAL_REASON_UNREACHABLE
        assert why in failed.message
        found = await w["d0"].report()
        assert found.counts["writes_refused"] == 1
        assert await w["d0"].ask("contents") == before
        assert await w.carry_on(spec, "p0", "d0", 2) == 2
        await w["p0"].idle()
        await w["d0"].idle()
        await w.whole_pool("p0", "d0")


async def test_a_corrupted_byte_does_not_count_and_is_sent_again() -> None:
    """With checksums on: what was garbled does not count, and is sent again under a new handoff."""
    async with workers("tcp") as w:
        w.add("p0")
        w.add("d0", settings=PATIENT)
        await w.start(proxied=True)
        assert w.wire is not None
        wire_, garbled = w.wire, list[int]()

        def flip(offset: int, data: bytes) -> bytes:
            if garbled or not offset <= HALF_WAY < offset + len(data):
                return data
            garbled.append(offset)
            at = HALF_WAY - offset
            return data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :]

        wire_.change = flip
        spec = w.spec()
        await w.begin(spec, "p0", "d0")
        failed = await w.failed(spec, "p0")
        assert failed.reason == wire.REFUSAL_REASON_UNREACHABLE
        assert "arrived with other bytes than were sent" in failed.message
        assert (await w["d0"].report()).counts["writes_refused"] == 1
        assert await w.carry_on(spec, "p0", "d0", 2) == 2
        await w["p0"].idle()
        await w["d0"].idle()
        await w.whole_pool("p0", "d0")


async def test_a_frozen_writer_leaves_all_slots_to_others() -> None:
    """What it was granted stays in quarantine, for no proof comes; another worker hands over as many sequences as the
    decode worker has slots."""
    async with workers("shm") as w:
        w.add("p0", Step.MID_BLOCK)
        w.add("p1")
        w.add("d0", settings={"max_sequences": 2})
        await w.start()
        frozen, others = [w.spec() for _ in range(2)], [w.spec(LAYOUT.block_tokens) for _ in range(2)]
        for spec in frozen:
            await w.begin(spec, "p0", "d0")
        await w["p0"].at(Step.MID_BLOCK)
        await w["d0"].until(lambda report: report.live["grants"] == 2, "to grant both")
        w["p0"].signal(signal.SIGSTOP)
        await w["d0"].until(lambda report: report.live["aborting"] == 2, "to give them up")
        await w["d0"].ask("gate", False)
        for spec in others:
            await w.begin(spec, "p1", "d0")
        await w["d0"].until(lambda report: report.live["residents"] == 2, "to have both")
        await w["d0"].ask("gate", True)
        for spec in others:
            await w.ended(spec, "d0")
        found = await w["d0"].report()
        assert (found.quarantined, found.counts.get("handoffs_refused", 0)) == (2 * PROMPT_BLOCKS, 0)
        w["p0"].signal(signal.SIGCONT)
        w["p0"].go()
        await w["d0"].idle()
        await w.whole_pool("p1", "d0")
