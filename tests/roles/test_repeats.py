"""Messages that come twice, late, early or out of order change nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from baton.rpc.convert import process_to_wire
from baton.v1 import transfer_pb2
from baton.v1 import worker_pb2 as wire
from baton.worker.sending.sender import Sender
from decode_worker.transfer import TransferService
from decode_worker.writer_streams import WriterStream
from tests.roles.conftest import Cluster
from tests.roles.counting import LAYOUT
from tests.rpc.waiting import until

BLOCK = LAYOUT.block_tokens


class Tap:
    """Repeats every message between the pair, and remembers them all for later."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.times = 1
        self.said: list[tuple[str, Callable[[], None]]] = []
        to_decode, to_prefill = TransferService._take, Sender.take

        def at_decode(service: TransferService, stream: WriterStream, frame: transfer_pb2.SenderFrame) -> None:
            self._deliver(str(frame.WhichOneof("body")), lambda: to_decode(service, stream, frame))

        def at_prefill(sender: Sender, frame: transfer_pb2.ReceiverFrame) -> None:
            self._deliver(str(frame.WhichOneof("body")), lambda: to_prefill(sender, frame))

        monkeypatch.setattr(TransferService, "_take", at_decode)
        monkeypatch.setattr(Sender, "take", at_prefill)

    def _deliver(self, kind: str, deliver: Callable[[], None]) -> None:
        if kind != "renew":
            self.said.append((kind, deliver))
        for _ in range(self.times):
            deliver()


@pytest.fixture
def tap(monkeypatch: pytest.MonkeyPatch) -> Tap:
    return Tap(monkeypatch)


@pytest.mark.parametrize("kind", ["memory", "shm", "tcp"])
async def test_everything_twice(cluster: Cluster, tap: Tap, kind: str) -> None:
    await cluster.add_prefill(kind=kind)
    await cluster.add_decode(kind=kind)
    tap.times = 2
    for prompt in (20, 100):
        spec = cluster.router.spec(prompt, max_tokens=6)
        cluster.router.prefill(cluster.p, spec)
        cluster.router.prefill(cluster.p, spec)
        await cluster.router.hears(cluster.p, "started", spec)
        cluster.router.bind(cluster.p, spec, cluster.d)
        cluster.router.bind(cluster.p, spec, cluster.d)
        await cluster.finished(spec)
        await cluster.idle()
        for node, frame in ((cluster.p, "started"), (cluster.p, "prefill_report"), (cluster.d, "resident")):
            assert len(cluster.router.heard(node, frame, spec)) == 1
        assert cluster.router.heard(cluster.p, "handoff_failed", spec) == []


async def test_everything_again_when_it_is_over(pair: Cluster, tap: Tap) -> None:
    spec = pair.router.spec(50, max_tokens=5)
    await pair.serve(spec)
    await pair.idle()
    assert [kind for kind, _ in tap.said if kind != "close"] == ["open", "grant", "commit", "committed"]
    frames = {name: len(link.frames) for name, link in pair.router.links.items()}
    for _, deliver in [*tap.said, *reversed(tap.said)]:
        deliver()
    for command in (pair.router.prefill, lambda node, spec: pair.router.bind(node, spec, pair.d)):
        command(pair.p, spec)
    fence = pair.router.spec(1)
    pair.router.say(pair.p, prefill=wire.PrefillCommand(spec=wire.SequenceSpec(attempt=fence.attempt)))
    await pair.router.hears(pair.p, "ended", fence)  # refused as malformed, behind the others
    await pair.idle()
    for name, link in pair.router.links.items():
        later = link.frames[frames[name] :]
        kinds = {f.WhichOneof("body") for f in later if f.ended.attempt != fence.attempt}
        # A bind for what is not held any more is answered, so that the router does not wait for it.
        assert kinds <= ({"load", "handoff_failed"} if name == pair.p.name else {"load"}), name


async def test_everything_again_when_it_is_cancelled(pair: Cluster, tap: Tap) -> None:
    pair.p.engine.gate.clear()
    spec = pair.router.spec(100, max_tokens=5)
    await pair.bound(spec)
    await until(lambda: pair.d.role.live["grants"], "the grant")
    for node in (pair.p, pair.d):
        pair.router.cancel(node, spec)
    await pair.router.hears(pair.d, "freed", spec)  # before the prompt is computed: it could still arrive else
    pair.p.engine.gate.set()
    await pair.router.hears(pair.p, "freed", spec)
    for _, deliver in [*tap.said, *reversed(tap.said)]:
        deliver()
    pair.router.prefill(pair.p, spec)
    pair.router.bind(pair.p, spec, pair.d)
    pair.router.bind(pair.p, spec, pair.d, 2)
    await until(lambda: pair.p.count("late_messages") >= 3, "the late commands")
    await pair.idle()
    assert not pair.router.heard(pair.d, "resident", spec)
    assert len(pair.router.heard(pair.p, "started", spec)) == 1


async def test_the_first_handoff_again_during_the_second(cluster: Cluster, tap: Tap) -> None:
    await cluster.add_prefill()
    await cluster.add_decode()
    cluster.p.engine.gate.clear()
    spec = cluster.router.spec(100, max_tokens=5)
    await cluster.bound(spec)
    await until(lambda: any(kind == "grant" for kind, _ in tap.said), "the grant")
    first = list(tap.said)
    cluster.router.bind(cluster.p, spec, cluster.d, 2)
    await until(lambda: [kind for kind, _ in tap.said].count("grant") == 2, "the second grant")
    for _, deliver in [*first, *reversed(first)]:
        deliver()
    cluster.router.bind(cluster.p, spec, cluster.d, 1)
    cluster.router.bind(cluster.p, spec, cluster.d, 2)
    cluster.p.engine.gate.set()
    await cluster.finished(spec)
    assert [resident.handoff for resident in cluster.router.heard(cluster.d, "resident", spec)] == [2]


async def test_a_bind_before_the_start_is_dropped(cluster: Cluster) -> None:
    await cluster.add_prefill(max_ungranted=1)
    await cluster.add_decode()
    blocker, spec = cluster.router.spec(20), cluster.router.spec(20)
    await cluster.started(blocker)
    cluster.router.prefill(cluster.p, spec)
    cluster.router.bind(cluster.p, spec, cluster.d)
    await until(lambda: cluster.p.count("late_messages"), "the early bind")
    cluster.router.bind(cluster.p, blocker, cluster.d)
    await cluster.finished(blocker)
    await cluster.router.hears(cluster.p, "started", spec)
    cluster.router.bind(cluster.p, spec, cluster.d)
    await cluster.finished(spec)


async def test_messages_about_nobody(pair: Cluster, tap: Tap) -> None:
    await pair.serve(pair.router.spec(5))
    stranger = pair.router.spec(5)
    (sender,) = pair.p.role.senders
    (stream,) = pair.d.streams
    about: dict[str, Any] = {"attempt": stranger.attempt, "handoff": 3}
    for from_decode in (
        {"grant": transfer_pb2.Grant(**about, generation=5, blocks=[1], write_token=b"x" * 16)},
        {"committed": transfer_pb2.Committed(**about)},
        {"refused": transfer_pb2.Refused(**about)},
        {"abort": transfer_pb2.AbortNotice(**about)},
        {},
    ):
        sender.take(transfer_pb2.ReceiverFrame(**from_decode))
    for from_prefill in (
        {"commit": transfer_pb2.CommitRequest(**about, generation=5)},
        {"close": transfer_pb2.CloseNotice(**about)},
        {},
    ):
        pair.d.transfer._take(stream, transfer_pb2.SenderFrame(**from_prefill))
    pair.router.bind(pair.p, stranger, pair.d)
    failed = await pair.router.hears(pair.p, "handoff_failed", stranger)
    assert failed.reason == wire.REFUSAL_REASON_EXPIRED
    pair.router.say(pair.d, bind=wire.BindCommand(attempt=b"short", decode_worker=process_to_wire(pair.d.process)))
    await pair.serve(pair.router.spec(5))


async def test_a_malformed_prompt_is_answered(pair: Cluster) -> None:
    spec = pair.router.spec(5)
    pair.router.say(pair.p, prefill=wire.PrefillCommand(spec=wire.SequenceSpec(attempt=spec.attempt)))
    ended = await pair.router.hears(pair.p, "ended", spec)
    assert ended.status == 13
    assert "spec.prompt_tokens" in ended.message


async def test_a_malformed_open_is_refused(pair: Cluster) -> None:
    await pair.serve(pair.router.spec(5))
    (stream,) = pair.d.streams
    before = pair.p.count("late_messages")
    message = transfer_pb2.OpenRequest(attempt=b"x" * 16, handoff=1, spec=wire.SequenceSpec(attempt=b"x" * 16))
    pair.d.transfer._open(stream, message)
    await until(lambda: pair.p.count("late_messages") > before, "the refusal")


@pytest.mark.parametrize("field", ["generation", "blocks"])
async def test_a_commit_that_contradicts_the_grant(pair: Cluster, field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another generation is ignored; another number of blocks ends the handoff."""
    take = TransferService._take

    def altered(service: TransferService, stream: WriterStream, frame: transfer_pb2.SenderFrame) -> None:
        if frame.WhichOneof("body") == "commit":
            wrong = transfer_pb2.SenderFrame()
            wrong.CopyFrom(frame)
            setattr(wrong.commit, field, getattr(wrong.commit, field) + 1)
            take(service, stream, wrong)
            if field == "blocks":
                return
        take(service, stream, frame)

    monkeypatch.setattr(TransferService, "_take", altered)
    spec = pair.router.spec(5)
    await pair.bound(spec)
    if field == "blocks":
        failed = await pair.router.hears(pair.p, "handoff_failed", spec)
        # The news comes as the abort, or as the refusal of the write that the commit had overtaken.
        told = {wire.REFUSAL_REASON_MISMATCH: "contradicts", wire.REFUSAL_REASON_UNREACHABLE: "no such grant"}
        assert told[failed.reason] in failed.message
        monkeypatch.undo()
        pair.router.bind(pair.p, spec, pair.d, 2)
    else:
        failed = await pair.router.hears(pair.p, "handoff_failed", spec)  # it is told that no such grant is known
        assert failed.reason == wire.REFUSAL_REASON_EXPIRED
        pair.router.cancel(pair.p, spec)
        pair.router.cancel(pair.d, spec)
        return
    await pair.finished(spec)
