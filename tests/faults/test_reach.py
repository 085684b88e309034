"""Workers that can reach each other in one way only: a pair finds it, and says what it found closed."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from baton.v1 import worker_pb2 as wire
from tests.faults.harness import PROMPT_BLOCKS, Workers, workers
from tests.faults.namespaces import why_no_pids
from tests.rpc.waiting import until

CLOSED = "shm: d0 refused the connection: its process is in a PID namespace that the receiver can't see into"


@pytest.fixture(scope="module", autouse=True)
def _pid_namespaces() -> None:
    if why := why_no_pids():
        pytest.skip(f"no PID namespaces here: {why}")


async def notes(w: Workers, transport: str) -> Mapping[str, str]:
    """What p0 tells the router of its pairs, of which one uses this transport."""

    def loads() -> list[wire.LoadReport]:
        reports = [frame.load for frame in w.router.links["p0"].frames if frame.WhichOneof("body") == "load"]
        return [report for report in reports if dict(report.pairs) == {transport: 1}]

    await until(loads, "the load report")
    return loads()[-1].pair_notes


@pytest.mark.parametrize(
    ("apart", "transport"),
    [(("p0", "d0"), "tcp"), (("d0",), "tcp"), (("p0",), "shm")],
    ids=["two containers of a pod", "the writer outside", "the writer in sight"],
)
async def test_pid_namespaces_of_one_network_hand_over(apart: tuple[str, ...], transport: str) -> None:
    """As containers of one pod: the shm socket is reached, but the receiver would not see the writer's end."""
    async with workers("auto") as w:
        for name in ("p0", "d0"):
            w.add(name, own_pids=name in apart)
        await w.start()
        for _ in range(2):
            spec = w.spec()
            assert await w.serve(spec, "p0", "d0") == 1
            (report,) = w.router.heard(w["p0"], "prefill_report", spec)
            assert (report.transport, report.transfer_blocks) == (transport, PROMPT_BLOCKS)
        found = await w["p0"].idle()
        await w["d0"].idle()
        fell_back = transport == "tcp"
        assert found.counts.get("transport_fallbacks", 0) == fell_back
        assert await notes(w, transport) == ({"tcp": CLOSED} if fell_back else {})


async def test_shm_alone_fails_with_the_reason() -> None:
    async with workers("shm") as w:
        w.add("p0", own_pids=True)
        w.add("d0", own_pids=True)
        await w.start()
        spec = w.spec()
        await w.begin(spec, "p0", "d0")
        failed = await w.failed(spec, "p0")
        assert failed.reason == wire.REFUSAL_REASON_UNREACHABLE
        assert failed.message == f"d0: no transport works: {CLOSED}"


async def test_where_no_way_is_open_the_router_hears_of_each() -> None:
    """The address that d0 gives for tcp is d1's."""
    async with workers("auto") as w:
        w.add("p0", own_pids=True)
        w.add("d0", own_pids=True)
        w.add("d1")
        await w.start()
        before = await w["d1"].ask("contents")
        own, others = await w["d0"].ask("endpoint"), await w["d1"].ask("endpoint")
        address = others.partition("#")[0]
        await w["d0"].ask("advertise", f"{address}#{own.partition('#')[2]}")
        spec = w.spec()
        await w.begin(spec, "p0", "d0")
        failed = await w.failed(spec, "p0")
        tcp = f"tcp: d0 is not at {address}: another receiver answers there"
        assert failed.message == f"d0: no transport works: {CLOSED}; {tcp}"
        assert await w["d1"].ask("contents") == before
        await w["d0"].ask("advertise", own)  # as if d0 had been started anew with the right one
        assert await w.carry_on(spec, "p0", "d0", 2) >= 2
        await w["p0"].idle()
        assert "writes_refused" not in (await w["d1"].idle()).counts
