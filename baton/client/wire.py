"""Between the wire's messages and the SDK's dataclasses; the only file of the client that knows both."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, TypeVar

from google.protobuf.message import Message as ProtoMessage

from baton.client import reports, types
from baton.errors import InvalidArgument
from baton.spec import TokenLogprobs
from baton.v1 import admin_pb2 as admin
from baton.v1 import generation_pb2 as gen
from baton.v1 import worker_pb2 as worker

T = TypeVar("T")
TOP_LEVEL = ("model", "request_id", "logprobs", "priority", "tenant_salt")
ENUMS = {"when_unmet": gen.UnmetPolicy, "on_disconnect": gen.OnDisconnect}


def request_to_wire(prompt: str | None, options: types.RequestOptions) -> gen.GenerateRequest:
    """Raises TypeError for an option that does not exist, InvalidArgument for a value that the wire can't carry."""
    unknown = options.keys() - types.RequestOptions.__annotations__.keys()
    if unknown:
        raise TypeError(f"no such option: {', '.join(sorted(unknown))}")
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    request = gen.GenerateRequest()
    _assign(request, "prompt", prompt)
    if "token_ids" in given:
        request.token_ids.SetInParent()
        _assign(request.token_ids, "ids", given["token_ids"], "token_ids")
    if "messages" in given:
        _assign_chat(request.chat, given["messages"])
    for name in TOP_LEVEL:
        _assign(request, name, given.get(name))
    for parent, part in (("sampling", request.sampling), ("stopping", request.stopping), ("slo", request.slo)):
        for field in part.DESCRIPTOR.fields:
            _assign(part, field.name, given.get(field.name), f"{parent}.{field.name}")
    for name, enum in ENUMS.items():
        if name in given:
            prefix = enum.DESCRIPTOR.values[0].name.removesuffix("UNSPECIFIED")
            known = {entry.name.removeprefix(prefix).lower(): entry.number for entry in enum.DESCRIPTOR.values[1:]}
            if given[name] not in known:
                raise InvalidArgument(name, f"one of {', '.join(known)}, not {given[name]!r}")
            setattr(request, name, known[given[name]])
    return request


def tokenize_to_wire(prompt: str | None, messages: list[types.Message] | None, model: str) -> gen.TokenizeRequest:
    """Raises InvalidArgument for text that is not Unicode."""
    request = gen.TokenizeRequest(model=model)
    _assign(request, "prompt", prompt)
    if messages is not None:
        _assign_chat(request.chat, messages)
    return request


def _assign(message: ProtoMessage, name: str, value: Any, path: str = "") -> None:
    """Sets a field unless the value is None. Protobuf's own range and type errors come out with the field's path."""
    if value is None:
        return
    try:
        if isinstance(value, (list, tuple)):
            getattr(message, name).extend(value)
        else:
            setattr(message, name, value)
    except UnicodeError:
        raise InvalidArgument(path or name, "is not valid Unicode text") from None
    except (ValueError, TypeError) as error:
        raise InvalidArgument(path or name, str(error)) from None


def _assign_chat(chat: gen.Chat, messages: list[types.Message]) -> None:
    chat.SetInParent()
    for index, (role, content) in enumerate(messages):
        entry = chat.messages.add()
        _assign(entry, "role", role, f"chat.messages[{index}].role")
        _assign(entry, "content", content, f"chat.messages[{index}].content")


def event_from_wire(message: gen.GenerateResponse) -> types.Event | None:
    """None for a kind of event that only a newer server knows."""
    match message.WhichOneof("event"):
        case "accepted":
            return _mirror(types.Accepted, message.accepted)
        case "tokens":
            return _tokens(message.tokens)
        case "finished":
            return _finished(message.finished)
    return None


def _tokens(message: gen.Tokens) -> types.Tokens:
    """Written out: it runs once per token."""
    logprobs = (
        TokenLogprobs(entry.logprob, tuple((best.id, best.logprob) for best in entry.top)) for entry in message.logprobs
    )
    return types.Tokens(message.position, tuple(message.ids), message.text, tuple(logprobs))


def _finished(message: gen.Finished) -> types.Finished:
    timeline = message.timeline
    return types.Finished(
        reason=types.FinishReason(_enum_value(gen.FinishReason, message.reason)),
        usage=_mirror(types.Usage, message.usage),
        timeline=_mirror(
            types.Timeline,
            timeline,
            path=types.Path(_enum_value(gen.Path, timeline.path)),
            former_attempts=tuple(_mirror(types.FormerAttempt, former) for former in timeline.former_attempts),
        ),
        slo=_mirror(types.SloOutcome, message.slo) if message.HasField("slo") else None,
        stop=message.stop,
    )


def model_from_wire(message: gen.ModelInfo) -> reports.ModelInfo:
    return _mirror(reports.ModelInfo, message)


def worker_from_wire(message: admin.WorkerInfo) -> reports.WorkerInfo:
    load = message.load
    known = message.HasField("predictions")
    return _mirror(
        reports.WorkerInfo,
        message,
        **_process(message),
        blocks=message.capacity.blocks,
        max_sequences=message.capacity.max_sequences,
        transports=tuple(message.transports),
        load=_mirror(reports.Load, load, pairs=dict(load.pairs), pair_notes=dict(load.pair_notes)),
        predictions=_mirror(reports.Predictions, message.predictions) if known else None,
        step_error=load.cost.error if load.HasField("cost") else None,
    )


def workers_from_wire(message: admin.ListWorkersResponse) -> reports.WorkerList:
    return reports.WorkerList(map(worker_from_wire, message.workers), message.degraded)


def status_from_wire(message: admin.GetStatusResponse) -> reports.ProcessStatus:
    return _mirror(
        reports.ProcessStatus,
        message,
        **_process(message),
        pool=_mirror(reports.PoolStatus, message.pool) if message.HasField("pool") else None,
        degraded=tuple(message.degraded),
        live=dict(message.live),
        counters=dict(message.counters),
        pairs=tuple(
            _mirror(reports.Pair, pair, peer=pair.peer.name, address=pair.peer.address) for pair in message.pairs
        ),
    )


def placement_from_wire(message: admin.Placement) -> reports.Placement:
    candidates = tuple(_mirror(reports.Candidate, entry) for entry in message.candidates)
    return _mirror(reports.Placement, message, candidates=candidates)


def _process(message: admin.WorkerInfo | admin.GetStatusResponse) -> dict[str, Any]:
    process = message.process
    roles = tuple(_enum_value(worker.Role, number) for number in message.roles)
    return {"name": process.name, "incarnation": process.incarnation, "address": process.address, "roles": roles}


def _mirror(kind: type[T], message: ProtoMessage, **converted: Any) -> T:
    """A dataclass with the message's fields of the same names, None for absent ones, and with those `converted`."""
    for field in fields(kind):  # type: ignore[arg-type]
        if field.name not in converted:
            absent = message.DESCRIPTOR.fields_by_name[field.name].has_presence and not message.HasField(field.name)
            converted[field.name] = None if absent else getattr(message, field.name)
    return kind(**converted)


def _enum_value(enum: Any, number: int) -> str:
    """`FINISH_REASON_STOP_TOKEN` as "stop_token"; "unknown" for unspecified and for a newer server's values."""
    entry = enum.DESCRIPTOR.values_by_number.get(number)
    if entry is None or number == 0:
        return "unknown"
    prefix: str = enum.DESCRIPTOR.values[0].name.removesuffix("UNSPECIFIED")
    return str(entry.name).removeprefix(prefix).lower()
