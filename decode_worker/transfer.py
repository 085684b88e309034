"""The Transfer service: one control stream per prefill worker, a handshake first and then its handoffs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import structlog

from baton import errors
from baton.identity import fingerprint_difference, host_id
from baton.rpc import convert
from baton.rpc.awake import patience
from baton.rpc.greeting import agree_on_version, check_receiver
from baton.rpc.lanes import Assembler
from baton.rpc.net import cancelling
from baton.rpc.status import abort
from baton.spec import ProcessRef, RefusalReason
from baton.telemetry import Counts
from baton.v1 import transfer_pb2 as wire
from baton.v1.transfer_pb2_grpc import TransferServicer
from baton.worker.service import WorkerService
from decode_worker.records import FirstToken
from decode_worker.service import DecodeRole
from decode_worker.writer_streams import WriterStream, WriterStreams
from kvtransfer.handoffs.messages import Refusal
from kvtransfer.handoffs.outcomes import LedgerOutcome

HANDSHAKE_S = 5.0
SILENT_WRITER_S = 60.0
log = structlog.get_logger(__name__)


class TransferService(TransferServicer):
    """Serves `Transfer` for one decode role, which answers on `streams`."""

    def __init__(
        self,
        role: DecodeRole,
        streams: WriterStreams,
        worker: WorkerService,
        process: ProcessRef,
        lease_s: float,
        counts: Counts,
        checksums: bool = False,
        tcp_tls: bool = False,
    ) -> None:
        """`worker` has the sessions of the routers that specs name."""
        self._role, self._streams, self._worker, self._process = role, streams, worker, process
        self._options = {"checksums": checksums, "tcp_tls": tcp_tls}
        self._lease_s, self._counts = lease_s, counts

    async def Handoff(
        self, request_iterator: AsyncIterator[wire.SenderFrame], context: Any
    ) -> AsyncIterator[wire.ReceiverFrame]:
        try:
            async with asyncio.timeout(HANDSHAKE_S):
                first = await anext(request_iterator)
        except (StopAsyncIteration, TimeoutError):
            await abort(context, errors.InvalidArgument("handshake", "a stream starts with a handshake"))
        if first.WhichOneof("body") != "handshake" or not first.handshake.process.incarnation:
            await abort(context, errors.InvalidArgument("handshake", "must come first and name the process"))
        answer = self.handshake(first.handshake)
        yield wire.ReceiverFrame(handshake=answer)
        if answer.HasField("mismatch"):
            return
        stream = WriterStream(convert.process_from_wire(first.handshake.process))
        self._streams.add(stream)
        self._role.handoffs.writer_back(stream.process.incarnation)
        reader = asyncio.create_task(self._read(stream, request_iterator))
        try:
            async with cancelling(reader):
                async for frame in stream.outgoing():
                    yield frame
            if stream.error is not None:
                await abort(context, stream.error)
        finally:
            self._streams.discard(stream)

    def handshake(self, theirs: wire.HandshakeRequest) -> wire.HandshakeResponse:
        """What this worker offers the sender, or the first field in which the two differ."""
        answer = wire.HandshakeResponse(
            process=convert.process_to_wire(self._process), lease_ms=int(self._lease_s * 1e3)
        )
        try:
            check_receiver(theirs.receiver, self._process)
            answer.version = agree_on_version(theirs)
            self._check(theirs)
            answer.endpoints.extend(self._endpoints(theirs))
        except errors.Mismatch as error:
            answer.mismatch.CopyFrom(
                wire.Mismatch(field=error.field, sender_value=error.theirs, receiver_value=error.ours)
            )
            self._counts.add("handshakes_refused")
            about = {"field": error.field, "theirs": error.theirs, "ours": error.ours}
            log.warning("handshake refused", sender=theirs.process.name, **about)
        return answer

    def _endpoints(self, theirs: wire.HandshakeRequest) -> list[wire.Endpoint]:
        """The transports that both sides can use, best first. Raises Mismatch where there is none."""
        receivers = self._role.handoffs.receivers
        common = [kind for kind in receivers if kind in theirs.transports]
        if not common:
            raise errors.Mismatch("transports", ", ".join(receivers), ", ".join(theirs.transports))
        usable = [kind for kind in common if kind != "shm" or theirs.host == host_id()]
        if not usable:
            raise errors.Mismatch("host", host_id(), theirs.host)
        return [wire.Endpoint(transport=kind, address=receivers[kind].endpoint()) for kind in usable]

    def _check(self, theirs: wire.HandshakeRequest) -> None:
        """Raises Mismatch where the two workers can't understand each other's KV."""
        if difference := convert.layout_from_wire(theirs.kv_layout).difference(self._role.layout):
            field, sender, receiver = difference
            raise errors.Mismatch(f"kv_layout.{field}", receiver, sender)
        for field, ours in self._options.items():
            if (offered := bool(getattr(theirs, field))) != ours:
                raise errors.Mismatch(field, str(ours).lower(), str(offered).lower())
        if theirs.fingerprint != self._role.fingerprint:
            raise errors.Mismatch(*fingerprint_difference(self._role.fingerprint, theirs.fingerprint))

    async def _read(self, stream: WriterStream, source: AsyncIterator[wire.SenderFrame]) -> None:
        """Until the stream ends, or the writer has not renewed its lease for so long that its host must be gone."""
        assembler: Assembler[wire.SenderFrame] = Assembler(wire.SenderFrame)
        try:
            async with patience(SILENT_WRITER_S) as limit:
                async for frame in source:
                    limit.restart()
                    whole = assembler.add(frame.fragment) if frame.WhichOneof("body") == "fragment" else frame
                    if whole is not None:
                        self._take(stream, whole)
        except TimeoutError:
            stream.error = errors.DeadlineExceeded(f"silent for {SILENT_WRITER_S:g} s")
            log.warning("control stream ended", writer=stream.process.name, error=str(stream.error))
        except (errors.ResourceExhausted, errors.InvalidArgument) as error:
            log.warning("control stream ended", writer=stream.process.name, error=str(error))
            stream.error = error
        except Exception as error:  # a boundary: the writer comes back with a new stream
            log.error("unexpected error on a control stream", writer=stream.process.name, exc_info=error)
        finally:
            stream.end()

    def _take(self, stream: WriterStream, frame: wire.SenderFrame) -> None:
        kind = frame.WhichOneof("body")
        if not self._streams.is_current(stream):
            self._counts.add("late_messages")  # the writer asks again on its newer stream
            return
        if kind == "open":
            self._open(stream, frame.open)
        elif kind == "commit":
            self._commit(stream, frame.commit)
        elif kind == "close":
            self._role.handoffs.closed(convert.handoff_from_wire(frame.close))
        elif kind == "renew":
            self._role.handoffs.renew(stream.process.incarnation)
            stream.send(renewed=wire.RenewResponseFrame(lease_ms=int(self._lease_s * 1e3)))
        else:
            self._counts.add("frames_unknown")

    def _open(self, stream: WriterStream, message: wire.OpenRequest) -> None:
        key = convert.handoff_from_wire(message)
        try:
            spec = convert.spec_from_wire(message.spec)
        except errors.InvalidArgument as error:
            stream.answer(Refusal(key, RefusalReason.MISMATCH, str(error)))
            return
        router = self._worker.session(spec.router)
        stream.answer(self._role.handoffs.open(key, stream.process.incarnation, spec, router, message.transport))

    def _commit(self, stream: WriterStream, message: wire.CommitRequest) -> None:
        key = convert.handoff_from_wire(message)
        logprobs = convert.logprobs_from_wire(message.first_logprobs) if message.HasField("first_logprobs") else None
        first = FirstToken(message.first_token, logprobs, time.monotonic() - message.first_token_age_us / 1e6)
        outcome = self._role.handoffs.commit(key, message.generation, message.blocks, first)
        if outcome is LedgerOutcome.ALREADY:
            stream.send(committed=wire.Committed(attempt=key.attempt, handoff=key.handoff))
        elif outcome is LedgerOutcome.IGNORED and not self._role.handoffs.is_aborting(key):
            gone = "no such grant here, or not any more"
            stream.answer(Refusal(key, RefusalReason.EXPIRED, gone))
