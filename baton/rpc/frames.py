"""Translates `baton.messages` to and from the frames of the stream between a router and a worker.

A newer peer's unknown message reads as None, its unknown reason as no reason.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from baton.messages import (
    BindCommand,
    CacheSyncCommand,
    CacheUpdate,
    CancelCommand,
    Command,
    DirectCommand,
    Ended,
    Event,
    Freed,
    HandoffDone,
    HandoffFailed,
    HandoffWaiting,
    LoadReport,
    Preempted,
    PrefillCommand,
    PrefillReport,
    Pulse,
    Started,
    TokenRun,
    Tokens,
    Transfer,
)
from baton.rpc import convert
from baton.rpc.status import error_of_code, number_of
from baton.spec import FinishReason
from baton.v1 import worker_pb2 as wire

LOAD_COUNTS = (
    "waiting", "running", "waiting_tokens", "free_blocks", "cached_blocks", "held_blocks", "quarantined_blocks",
    "resident_tokens", "granted_blocks", "promised_blocks",
)  # fmt: skip
PREFILL = ("attempt", "queue_ms", "prefill_ms", "cached_tokens")
TRANSFER = ("ms", "exposed_ms", "bytes", "blocks", "cached_blocks")
Write = Callable[[Any], Any]
Read = Callable[[Any], Event]


def command_to_frame(command: Command) -> wire.RouterFrame:
    match command:
        case PrefillCommand(spec):
            return wire.RouterFrame(prefill=wire.PrefillCommand(spec=convert.spec_to_wire(spec)))
        case DirectCommand(spec):
            return wire.RouterFrame(direct=wire.DirectCommand(spec=convert.spec_to_wire(spec)))
        case BindCommand(key, decode):
            process = convert.process_to_wire(decode)
            bind = wire.BindCommand(attempt=key.attempt, handoff=key.handoff, decode_worker=process)
            return wire.RouterFrame(bind=bind)
        case CancelCommand(attempt, reason):
            return wire.RouterFrame(cancel=wire.CancelCommand(attempt=attempt, reason=reason))
        case CacheSyncCommand(sync):
            return wire.RouterFrame(cache_sync=wire.CacheSyncCommand(sync=sync))


def command_from_frame(frame: wire.RouterFrame) -> Command | None:
    """Raises InvalidArgument for a spec that no router of ours sends."""
    kind = frame.WhichOneof("body")
    if kind == "prefill":
        return PrefillCommand(convert.spec_from_wire(frame.prefill.spec))
    if kind == "direct":
        return DirectCommand(convert.spec_from_wire(frame.direct.spec))
    if kind == "bind":
        return BindCommand(convert.handoff_from_wire(frame.bind), convert.process_from_wire(frame.bind.decode_worker))
    if kind == "cancel":
        return CancelCommand(frame.cancel.attempt, frame.cancel.reason)
    return CacheSyncCommand(frame.cache_sync.sync) if kind == "cache_sync" else None


def attempt_of(frame: wire.RouterFrame) -> bytes:
    """The attempt of a prompt or a bind, also where the rest can't be read; empty for other commands."""
    kind = frame.WhichOneof("body")
    if kind == "bind":
        return frame.bind.attempt
    return getattr(frame, kind).spec.attempt if kind in ("prefill", "direct") else b""


def event_to_frame(event: Event) -> wire.WorkerFrame:
    body, write = _WRITERS[type(event)]
    return wire.WorkerFrame(**{body: write(event)})


def event_from_frame(frame: wire.WorkerFrame) -> Event | None:
    kind = frame.WhichOneof("body")
    read = _READERS.get(kind or "")
    return None if read is None else read(getattr(frame, kind or ""))


def pulse_to_heartbeat(pulse: Pulse) -> wire.Heartbeat:
    age_ms, predicted_ms = pulse.age_s * 1e3, pulse.predicted_s * 1e3
    return wire.Heartbeat(step=pulse.step, step_age_ms=age_ms, step_predicted_ms=predicted_ms)


def pulse_of(frame: wire.WorkerFrame) -> Pulse | None:
    """None where it is no heartbeat of a worker with sequences."""
    beat = frame.heartbeat if frame.WhichOneof("body") == "heartbeat" else None
    return Pulse(beat.step, beat.step_age_ms / 1e3, beat.step_predicted_ms / 1e3) if beat and beat.step else None


def _same(event_type: Callable[..., Event], message_type: Callable[..., Any], *names: str) -> tuple[Write, Read]:
    """For an event whose fields, all of them, have the message's names."""
    return (
        lambda event: message_type(**{name: getattr(event, name) for name in names}),
        lambda message: event_type(**{name: getattr(message, name) for name in names}),
    )


def _optional(message: Any, name: str) -> Any:
    return getattr(message, name) if message.HasField(name) else None


def _tokens_to_wire(event: Tokens) -> wire.TokenFrame:
    message = wire.TokenFrame()
    for run in event.runs:
        logprobs = map(convert.logprobs_to_wire, run.logprobs)
        message.runs.add(attempt=run.attempt, position=run.position, ids=run.ids, logprobs=logprobs)
    return message


def _tokens_from_wire(message: wire.TokenFrame) -> Tokens:
    runs = []
    for run in message.runs:
        logprobs = [*map(convert.logprobs_from_wire, run.logprobs)] if run.logprobs else ()
        runs.append(TokenRun(run.attempt, run.position, run.ids, logprobs))
    return Tokens(runs)


def _failed_to_wire(event: HandoffFailed) -> wire.HandoffFailed:
    return wire.HandoffFailed(
        attempt=event.key.attempt,
        handoff=event.key.handoff,
        reason=event.reason.value,  # type: ignore[arg-type]  # the same numbers
        message=event.message,
        retry_after_ms=None if event.retry_after_s is None else event.retry_after_s * 1e3,
    )


def _failed_from_wire(message: wire.HandoffFailed) -> HandoffFailed:
    retry = convert.retry_after_from_wire(message)
    reason = convert.refusal_from_wire(message.reason)
    return HandoffFailed(convert.handoff_from_wire(message), reason, message.message, retry)


def _report_to_wire(event: PrefillReport) -> wire.PrefillReport:
    message = wire.PrefillReport(**{name: getattr(event, name) for name in PREFILL})
    if (moved := event.transfer) is not None:
        transfer = {f"transfer_{name}": getattr(moved, name) for name in TRANSFER}
        message.MergeFrom(wire.PrefillReport(transport=moved.transport, **transfer))
    return message


def _report_from_wire(message: wire.PrefillReport) -> PrefillReport:
    transfer = None
    if message.transport:
        costs = {name: getattr(message, f"transfer_{name}") for name in ("bytes", "blocks", "cached_blocks")}
        ms, exposed_ms = _optional(message, "transfer_ms"), _optional(message, "transfer_exposed_ms")
        transfer = Transfer(message.transport, ms, exposed_ms, **costs)
    return PrefillReport(**{name: getattr(message, name) for name in PREFILL}, transfer=transfer)


def _ended_to_wire(event: Ended) -> wire.Ended:
    return wire.Ended(
        attempt=event.attempt,
        reason=event.reason.value if event.reason is not None else 0,  # type: ignore[arg-type]  # the same numbers
        status=None if event.error is None else number_of(event.error),
        message="" if event.error is None else str(event.error),
        output_tokens=event.output_tokens,
        first_step_wait_ms=event.first_step_wait_ms,
        decode_ms=event.decode_ms,
    )


def _ended_from_wire(message: wire.Ended) -> Ended:
    return Ended(
        message.attempt,
        FinishReason(message.reason) if message.reason in _FINISHED else None,
        error_of_code(message.status, message.message) if message.status else None,
        message.output_tokens,
        _optional(message, "first_step_wait_ms"),
        _optional(message, "decode_ms"),
    )


def load_to_wire(event: LoadReport) -> wire.LoadReport:
    cost = None if event.cost is None else convert.cost_to_wire(event.cost, event.cost_error, event.chunk_tokens)
    counts = {name: getattr(event, name) for name in LOAD_COUNTS}
    return wire.LoadReport(cost=cost, pairs=event.pairs, pair_notes=event.pair_notes, **counts)


def _load_from_wire(message: wire.LoadReport) -> LoadReport:
    return LoadReport(
        cost=convert.cost_from_wire(message.cost) if message.HasField("cost") else None,
        cost_error=message.cost.error,
        chunk_tokens=message.cost.chunk_tokens,
        pairs=dict(message.pairs),
        pair_notes=dict(message.pair_notes),
        **{name: getattr(message, name) for name in LOAD_COUNTS},
    )


_FINISHED = frozenset(reason.value for reason in FinishReason)
_EVENTS: dict[type, tuple[str, tuple[Write, Read]]] = {
    Started: ("started", _same(Started, wire.Started, "attempt", "queue_ms", "cached_tokens")),
    Tokens: ("tokens", (_tokens_to_wire, _tokens_from_wire)),
    HandoffFailed: ("handoff_failed", (_failed_to_wire, _failed_from_wire)),
    HandoffDone: (
        "resident",
        (
            lambda event: wire.Resident(attempt=event.key.attempt, handoff=event.key.handoff),
            lambda message: HandoffDone(convert.handoff_from_wire(message)),
        ),
    ),
    HandoffWaiting: (
        "handoff_waiting",
        (
            lambda event: wire.HandoffWaiting(
                attempt=event.key.attempt, handoff=event.key.handoff, ahead=event.ahead, expected_ms=event.expected_ms
            ),
            lambda message: HandoffWaiting(
                convert.handoff_from_wire(message), message.ahead, convert.sane(message.expected_ms)
            ),
        ),
    ),
    Preempted: ("preempted", _same(Preempted, wire.Preempted, "attempt", "cached_tokens")),
    PrefillReport: ("prefill_report", (_report_to_wire, _report_from_wire)),
    Ended: ("ended", (_ended_to_wire, _ended_from_wire)),
    Freed: ("freed", _same(Freed, wire.Freed, "attempt")),
    LoadReport: ("load", (load_to_wire, _load_from_wire)),
    CacheUpdate: ("cache_events", _same(CacheUpdate, wire.CacheEvents, "sync", "sequence", "inserted", "evicted")),
}
"""The event's name on the wire, and how it is written and read."""
_WRITERS = {kind: (body, write) for kind, (body, (write, _)) in _EVENTS.items()}
_READERS = {body: read for body, (_, read) in _EVENTS.values()}
