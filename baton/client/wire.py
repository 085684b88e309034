"""Between the wire's messages and the SDK's dataclasses; the only file of the client that knows both."""

from __future__ import annotations

from typing import Any

from google.protobuf.message import Message as ProtoMessage

from baton.client import types
from baton.errors import InvalidArgument
from baton.spec import TokenLogprobs
from baton.v1 import admin_pb2 as admin
from baton.v1 import generation_pb2 as gen
from baton.v1 import worker_pb2 as worker

SAMPLING = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "seed",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)
STOPPING = ("max_tokens", "stop", "stop_token_ids", "ignore_eos")
OBJECTIVES = ("ttft_ms", "tpot_ms")
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
    for parent, path, names in (
        (request, "", TOP_LEVEL),
        (request.sampling, "sampling.", SAMPLING),
        (request.stopping, "stopping.", STOPPING),
        (request.slo, "slo.", OBJECTIVES),
    ):
        for name in names:
            _assign(parent, name, given.get(name), path + name)
    for name, enum in ENUMS.items():
        if name in given:
            _assign_enum(request, name, enum, given[name])
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


def _assign_enum(request: gen.GenerateRequest, name: str, enum: Any, value: str) -> None:
    prefix = enum.DESCRIPTOR.values[0].name.removesuffix("UNSPECIFIED")
    known = {entry.name.removeprefix(prefix).lower(): entry.number for entry in enum.DESCRIPTOR.values[1:]}
    if value not in known:
        raise InvalidArgument(name, f"one of {', '.join(known)}, not {value!r}")
    setattr(request, name, known[value])


def event_from_wire(message: gen.GenerateResponse) -> types.Event | None:
    """None for a kind of event that only a newer server knows."""
    match message.WhichOneof("event"):
        case "accepted":
            return _accepted(message.accepted)
        case "tokens":
            return _tokens(message.tokens)
        case "finished":
            return _finished(message.finished)
    return None


def _accepted(message: gen.Accepted) -> types.Accepted:
    return types.Accepted(
        request_id=message.request_id,
        model=message.model,
        seed=message.seed,
        prompt_tokens=message.prompt_tokens,
        max_tokens=message.max_tokens,
        predicted_ttft_ms=_optional(message, "predicted_ttft_ms"),
        predicted_tpot_ms=_optional(message, "predicted_tpot_ms"),
    )


def _tokens(message: gen.Tokens) -> types.Tokens:
    logprobs = (
        TokenLogprobs(entry.logprob, tuple((best.id, best.logprob) for best in entry.top)) for entry in message.logprobs
    )
    return types.Tokens(message.position, tuple(message.ids), message.text, tuple(logprobs))


def _finished(message: gen.Finished) -> types.Finished:
    slo = None
    if message.HasField("slo"):
        slo = types.SloOutcome(_optional(message.slo, "ttft_kept"), _optional(message.slo, "tpot_kept"))
    usage = message.usage
    return types.Finished(
        reason=types.FinishReason(_enum_value(gen.FinishReason, message.reason)),
        usage=types.Usage(usage.prompt_tokens, usage.output_tokens, usage.cached_prompt_tokens),
        timeline=_timeline(message.timeline),
        slo=slo,
        stop=message.stop,
    )


def _timeline(message: gen.Timeline) -> types.Timeline:
    return types.Timeline(
        ttft_ms=message.ttft_ms,
        tpot_ms=_optional(message, "tpot_ms"),
        total_ms=message.total_ms,
        router_ms=message.router_ms,
        queue_ms=message.queue_ms,
        prefill_ms=message.prefill_ms,
        transfer_ms=_optional(message, "transfer_ms"),
        transfer_exposed_ms=_optional(message, "transfer_exposed_ms"),
        first_step_wait_ms=_optional(message, "first_step_wait_ms"),
        decode_ms=_optional(message, "decode_ms"),
        attempts=message.attempts,
        handoffs=message.handoffs,
        prefill_worker=message.prefill_worker,
        decode_worker=message.decode_worker,
        path=types.Path(_enum_value(gen.Path, message.path)),
        transport=message.transport,
        transfer_bytes=message.transfer_bytes,
        transfer_blocks=message.transfer_blocks,
        transfer_cached_blocks=message.transfer_cached_blocks,
        simulated=message.simulated,
    )


def model_from_wire(message: gen.ModelInfo) -> types.ModelInfo:
    """See `ModelInfo`."""
    return types.ModelInfo(
        message.name,
        message.context_tokens,
        message.vocabulary_size,
        message.fingerprint,
        message.prefill_workers,
        message.decode_workers,
    )


def worker_from_wire(message: admin.WorkerInfo) -> types.WorkerInfo:
    """See `WorkerInfo`."""
    load = message.load
    return types.WorkerInfo(
        name=message.process.name,
        incarnation=message.process.incarnation,
        address=message.process.address,
        roles=_roles(message.roles),
        model=message.model,
        blocks=message.capacity.blocks,
        max_sequences=message.capacity.max_sequences,
        transports=tuple(message.transports),
        attached=message.attached,
        lease_left_ms=message.lease_left_ms,
        load=types.Load(
            load.waiting,
            load.running,
            load.waiting_tokens,
            load.resident_tokens,
            load.free_blocks,
            load.cached_blocks,
            load.held_blocks,
            load.quarantined_blocks,
            dict(load.pairs),
        ),
        attempts=message.attempts,
        predictions=_predictions(message),
        handoff_ms=message.handoff_ms if message.HasField("handoff_ms") else None,
        step_error=load.cost.error if load.HasField("cost") else None,
    )


def _predictions(message: admin.WorkerInfo) -> types.Predictions | None:
    if not message.HasField("predictions"):
        return None
    found = message.predictions
    return types.Predictions(found.promised, found.kept, found.error, found.factor)


def status_from_wire(message: admin.GetStatusResponse) -> types.ProcessStatus:
    """See `ProcessStatus`."""
    pool = None
    if message.HasField("pool"):
        seen = message.pool
        states = seen.free, seen.held, seen.cached, seen.quarantined
        pool = types.PoolStatus(seen.blocks, *states, seen.integrity_error, seen.bytes)
    return types.ProcessStatus(
        name=message.process.name,
        incarnation=message.process.incarnation,
        address=message.process.address,
        roles=_roles(message.roles),
        pool=pool,
        live=dict(message.live),
        counters=dict(message.counters),
        resident_bytes=message.resident_bytes,
        weight_bytes=message.weight_bytes,
        pairs=tuple(types.Pair(p.peer.name, p.peer.address, p.transport, p.handoffs) for p in message.pairs),
    )


def _roles(numbers: Any) -> tuple[str, ...]:
    return tuple(_enum_value(worker.Role, number) for number in numbers)


def _optional(message: Any, name: str) -> Any:
    return getattr(message, name) if message.HasField(name) else None


def _enum_value(enum: Any, number: int) -> str:
    """`FINISH_REASON_STOP_TOKEN` as "stop_token"; "unknown" for unspecified and for a newer server's values."""
    entry = enum.DESCRIPTOR.values_by_number.get(number)
    if entry is None or number == 0:
        return "unknown"
    prefix: str = enum.DESCRIPTOR.values[0].name.removesuffix("UNSPECIFIED")
    return str(entry.name).removeprefix(prefix).lower()


def placement_from_wire(message: admin.Placement) -> types.Placement:
    """See `Placement`."""
    return types.Placement(
        step=message.step,
        age_ms=message.age_ms,
        chosen=message.chosen,
        reason=message.reason,
        meets=message.meets,
        constraint=message.constraint,
        refused=message.refused,
        others=message.others,
        ttft_ms=_optional(message, "ttft_ms"),
        tpot_ms=_optional(message, "tpot_ms"),
        candidates=tuple(
            types.Candidate(
                worker=entry.worker,
                way=entry.way,
                feasible=entry.feasible,
                note=entry.note,
                load=entry.load,
                ttft_ms=_optional(entry, "ttft_ms"),
                tpot_ms=_optional(entry, "tpot_ms"),
            )
            for entry in message.candidates
        ),
    )
