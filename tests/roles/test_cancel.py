"""A cancel at every point: both workers say Freed, and hold nothing."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest

from baton.spec import HandoffKey, SequenceSpec
from baton.v1 import worker_pb2 as wire
from decode_worker.records import FirstToken
from kvtransfer.handoffs.messages import BlockMove, Ticket
from kvtransfer.handoffs.outcomes import LedgerOutcome
from kvtransfer.transports.memory import MemoryReceiver
from tests.roles.conftest import Cluster
from tests.roles.counting import LAYOUT
from tests.rpc.waiting import until

BLOCK = LAYOUT.block_tokens


async def cancel_everywhere(cluster: Cluster, spec: SequenceSpec) -> None:
    """As a router does: every worker that the attempt named."""
    for node in (cluster.p, cluster.d):
        cluster.router.cancel(node, spec)
    await freed(cluster, spec)


async def freed(cluster: Cluster, spec: SequenceSpec) -> None:
    for node in (cluster.p, cluster.d):
        await cluster.router.hears(node, "freed", spec)
    await cluster.idle()
    for node in (cluster.p, cluster.d):
        assert len(cluster.router.heard(node, "freed", spec)) == 1
        assert cluster.router.heard(node, "ended", spec) == []


async def test_waiting(cluster: Cluster) -> None:
    await cluster.add_prefill(max_ungranted=1)
    await cluster.add_decode()
    running, waiting = cluster.router.spec(20), cluster.router.spec(20)
    await cluster.started(running)
    cluster.router.prefill(cluster.p, waiting)
    await until(lambda: cluster.p.busy().get("attempts") == 2, "both there")
    cluster.router.cancel(cluster.p, waiting)
    await cluster.router.hears(cluster.p, "freed", waiting)
    assert cluster.router.heard(cluster.p, "started", waiting) == []
    await cancel_everywhere(cluster, running)


async def test_computing(pair: Cluster) -> None:
    """The step in progress ends first: its blocks are not freed under it."""
    pair.p.engine.gate.clear()
    spec = pair.router.spec(10 * BLOCK)
    await pair.started(spec)
    await until(pair.p.engine.waiting.is_set, "the step")
    pair.router.cancel(pair.p, spec)
    pair.router.cancel(pair.d, spec)
    await pair.router.hears(pair.d, "freed", spec)
    assert pair.router.heard(pair.p, "freed", spec) == []
    assert pair.p.pool.statistics().held == 10
    pair.p.engine.gate.set()
    await freed(pair, spec)
    assert len(pair.p.engine.batches) <= 2  # not the whole prompt


async def test_a_short_request_does_not_wait_for_cancelled_long_ones(cluster: Cluster) -> None:
    """ai-dynamo/dynamo#14507: the next request starts within one chunk."""
    await cluster.add_prefill(blocks=128, max_ungranted=64)
    await cluster.add_decode()
    cluster.p.engine.gate.clear()
    long = [cluster.router.spec(40 * BLOCK) for _ in range(10)]
    for spec in long:
        cluster.router.prefill(cluster.p, spec)
    await until(cluster.p.engine.waiting.is_set, "the first chunk")
    await until(lambda: cluster.p.busy().get("attempts") == 10, "all there")
    for spec in long:
        cluster.router.cancel(cluster.p, spec)
    short = cluster.router.spec(5, max_tokens=1)
    cluster.router.prefill(cluster.p, short)
    await until(lambda: cluster.p.count("cancels") == 10, "all cancelled")
    await until(lambda: cluster.p.busy().get("attempts", 0) <= 3, "what the engine has, and the short one")
    cluster.p.engine.gate.set()
    await cluster.router.hears(cluster.p, "ended", short)
    keys = [[key for key, _ in batch] for batch in cluster.p.engine.batches]
    assert next(number for number, batch in enumerate(keys) if short.attempt in batch) <= 1


async def test_computed_and_unbound(pair: Cluster) -> None:
    spec = pair.router.spec(40)
    await pair.started(spec)
    await until(lambda: pair.router.tokens(pair.p, spec), "the first token")
    await cancel_everywhere(pair, spec)


async def test_before_the_open_arrives(pair: Cluster) -> None:
    """The tombstone on the decode worker refuses it."""
    spec = pair.router.spec(40)
    await pair.started(spec)
    pair.router.cancel(pair.d, spec)
    await pair.router.hears(pair.d, "freed", spec)
    pair.router.bind(pair.p, spec, pair.d)
    failed = await pair.router.hears(pair.p, "handoff_failed", spec)
    assert failed.reason == wire.REFUSAL_REASON_CANCELLED
    assert not pair.d.busy()
    pair.router.cancel(pair.p, spec)
    await freed(pair, spec)


async def test_before_the_grant_arrives(pair: Cluster) -> None:
    """Cancelled on the prefill worker while the grant is on its way back: it is closed."""
    held: list[dict[str, object]] = []
    spec = pair.router.spec(40)
    await pair.started(spec)
    stream_type = "decode_worker.transfer.WriterStream.send"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream_type, lambda self, **body: held.append({"stream": self, **body}))
        pair.router.bind(pair.p, spec, pair.d)
        await until(lambda: held, "the grant")
        pair.router.cancel(pair.p, spec)
        await pair.router.hears(pair.p, "freed", spec)
    for body in held:
        stream = body.pop("stream")
        stream.send(**body)  # type: ignore[attr-defined]
    await until(lambda: not pair.d.busy(), "the close")
    pair.router.cancel(pair.d, spec)
    await freed(pair, spec)


@pytest.mark.parametrize("first", ["prefill", "decode"])
@pytest.mark.parametrize("kind", ["memory", "shm", "tcp"])
async def test_granted_and_computing(cluster: Cluster, kind: str, first: str) -> None:
    await cluster.add_prefill(kind=kind)
    await cluster.add_decode(kind=kind)
    cluster.p.engine.gate.clear()
    spec = cluster.router.spec(6 * BLOCK)
    await cluster.bound(spec)
    await until(lambda: cluster.d.role.live["grants"], "the grant")
    order = (cluster.p, cluster.d) if first == "prefill" else (cluster.d, cluster.p)
    cluster.router.cancel(order[0], spec)
    await until(lambda: not cluster.d.role.live["grants"], "given up")
    cluster.router.cancel(order[1], spec)
    cluster.p.engine.gate.set()
    await freed(cluster, spec)


async def test_while_transferring(pair: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stalled write still reads the source blocks: they are held until it returns."""
    await pair.serve(pair.router.spec(3))  # the pair is up
    checked: list[object] = []
    assert isinstance(pair.d.transport, MemoryReceiver)
    check = pair.d.transport.check

    def noted(ticket: Ticket, moves: Sequence[BlockMove], writer: str) -> str | None:
        checked.append(ticket)
        return check(ticket, moves, writer)

    monkeypatch.setattr(pair.d.transport, "check", noted)
    faults = pair.faults()
    faults.flowing.clear()
    spec = pair.router.spec(40)
    await pair.bound(spec)
    await until(lambda: checked, "the write, past the receiver's check")
    await until(lambda: pair.router.tokens(pair.p, spec), "the first token")
    pair.router.cancel(pair.p, spec)
    pair.router.cancel(pair.d, spec)
    await pair.router.hears(pair.d, "freed", spec)  # the double proves that no write is inside a block
    assert pair.router.heard(pair.p, "freed", spec) == []
    assert pair.p.pool.statistics().held == 3
    faults.flowing.set()
    await freed(pair, spec)


async def test_no_close_while_a_write_is_under_way(cluster: Cluster) -> None:
    """With shm the writer's Closed is the proof, so a write in progress must delay it, for any peer that asks."""
    await cluster.add_prefill(kind="shm")
    await cluster.add_decode(kind="shm")
    await cluster.serve(cluster.router.spec(3))
    (sender,) = cluster.p.role.senders
    spec = cluster.router.spec(40)
    with StalledWrite(cluster) as stalled:
        await cluster.bound(spec)
        await until(stalled.entered.is_set, "the write")
        cluster.router.cancel(cluster.p, spec)
        cluster.router.cancel(cluster.d, spec)
        await until(lambda: cluster.d.role.live["aborting"], "the abort")
        await until(lambda: cluster.p.count("late_messages"), "the abort notice at the writer")
        assert cluster.d.pool.statistics().quarantined == 3
        assert sender.writes == 1
        stalled.go_on.set()
        await freed(cluster, spec)
    assert not sender.writes


async def test_after_the_commit(pair: Cluster) -> None:
    """The commit has overtaken the news of the data, which comes too late then."""
    held: list[tuple[HandoffKey, int, tuple[int, ...]]] = []
    commits: list[object] = []
    landed, commit = pair.d.role.handoffs.landed, pair.d.role.handoffs.commit

    def committing(key: HandoffKey, generation: int, blocks: int, first: FirstToken) -> LedgerOutcome:
        commits.append(key)
        return commit(key, generation, blocks, first)

    pair.d.role.handoffs.landed = lambda *args: held.append(args)  # type: ignore[method-assign]
    pair.d.role.handoffs.commit = committing  # type: ignore[method-assign]
    spec = pair.router.spec(40)
    await pair.bound(spec)
    await until(lambda: commits and sum(len(indices) for _, _, indices in held) == 3, "commit and data")
    assert pair.router.heard(pair.d, "resident", spec) == []
    assert pair.router.heard(pair.p, "prefill_report", spec) == []
    pair.router.cancel(pair.p, spec)
    pair.router.cancel(pair.d, spec)
    await freed(pair, spec)
    for arguments in held:
        landed(*arguments)
    assert pair.router.heard(pair.d, "resident", spec) == []


async def test_resident(pair: Cluster) -> None:
    """The step in progress ends first."""
    pair.d.engine.gate.clear()
    spec = pair.router.spec(40, max_tokens=1000 - 600)
    await pair.bound(spec)
    await until(pair.d.engine.waiting.is_set, "the first decode step")
    await pair.router.hears(pair.p, "prefill_report", spec)
    pair.router.cancel(pair.d, spec)
    pair.router.cancel(pair.d, spec)
    pair.router.cancel(pair.p, spec)
    await pair.router.hears(pair.p, "freed", spec)
    assert pair.d.pool.statistics().held == LAYOUT.blocks_for(spec.kv_tokens)
    pair.d.engine.gate.set()
    await freed(pair, spec)
    assert set(pair.router.tokens(pair.d, spec)) == {40}


async def test_finished(pair: Cluster) -> None:
    """Too late to matter, and still answered."""
    spec = pair.router.spec(40)
    await pair.serve(spec)
    for node in (pair.p, pair.d):
        pair.router.cancel(node, spec)
        await pair.router.hears(node, "freed", spec)
        assert node.count("cancels_unknown") == 1


async def test_before_the_prompt_arrives(pair: Cluster) -> None:
    """A cancel overtakes a large prompt on the stream."""
    spec = pair.router.spec(20)
    pair.router.cancel(pair.p, spec)
    pair.router.prefill(pair.p, spec)
    await pair.router.hears(pair.p, "freed", spec)
    await until(lambda: pair.p.count("late_messages"), "the prompt")
    assert not pair.p.busy()
    assert pair.router.heard(pair.p, "started", spec) == []


class StalledWrite:
    """Stops the next write of p0 on its thread, after the lease was checked and before a byte moves."""

    def __init__(self, cluster: Cluster) -> None:
        (sender,) = cluster.p.role.senders
        self._mover = sender._mover
        self.entered, self.go_on = threading.Event(), threading.Event()

    def __enter__(self) -> StalledWrite:
        actual = self._mover._may_write

        def may_write() -> bool:
            valid = actual()
            self.entered.set()
            assert self.go_on.wait(20.0)
            return valid

        self._mover._may_write = may_write
        self._actual = actual
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.go_on.set()
        self._mover._may_write = self._actual
