"""Between the wire's messages and the plain dataclasses; the only place that knows both."""

from __future__ import annotations

from dataclasses import asdict, fields
from math import isfinite
from typing import Any

from baton.config import RoleName
from baton.cost import StepCost
from baton.errors import InvalidArgument, Mismatch
from baton.model import KvLayout, ModelCard
from baton.spec import HandoffKey, Objectives, ProcessRef, RefusalReason, Sampling, SequenceSpec, TokenLogprobs
from baton.v1 import generation_pb2 as gen
from baton.v1 import transfer_pb2 as transfer
from baton.v1 import worker_pb2 as wire

ROLES: dict[RoleName, wire.Role.ValueType] = {"prefill": wire.ROLE_PREFILL, "decode": wire.ROLE_DECODE}
ROLE_NAMES: dict[int, RoleName] = {number: name for name, number in ROLES.items()}


def process_to_wire(process: ProcessRef) -> wire.ProcessId:
    return wire.ProcessId(name=process.name, incarnation=process.incarnation, address=process.address)


def process_from_wire(message: wire.ProcessId) -> ProcessRef:
    return ProcessRef(message.name, message.incarnation, message.address)


def handoff_from_wire(message: object) -> HandoffKey:
    """The key of any message that has `attempt` and `handoff`."""
    return HandoffKey(message.attempt, message.handoff)  # type: ignore[attr-defined]


def sampling_to_wire(sampling: Sampling) -> wire.SamplingParams:
    return wire.SamplingParams(
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        seed=sampling.seed,
        repetition_penalty=sampling.repetition_penalty,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        logprobs=sampling.logprobs,
    )


def sampling_from_wire(message: wire.SamplingParams) -> Sampling:
    return Sampling(
        message.temperature,
        message.top_k,
        message.top_p,
        message.min_p,
        message.seed,
        message.repetition_penalty,
        message.presence_penalty,
        message.frequency_penalty,
        message.logprobs if message.HasField("logprobs") else None,
    )


def spec_to_wire(spec: SequenceSpec) -> wire.SequenceSpec:
    return wire.SequenceSpec(
        attempt=spec.attempt,
        request_id=spec.request_id,
        prompt_tokens=spec.prompt,
        output_tokens=spec.output,
        sampling=sampling_to_wire(spec.sampling),
        max_tokens=spec.max_tokens,
        stop_token_ids=sorted(spec.stop_token_ids),
        eos_token_ids=sorted(spec.eos_token_ids),
        slo=gen.Slo(ttft_ms=spec.objectives.ttft_ms, tpot_ms=spec.objectives.tpot_ms),
        priority=spec.priority,
        deadline_ms=None if spec.deadline_s is None else spec.deadline_s * 1e3,
        router=process_to_wire(spec.router),
        tenant_salt=spec.tenant_salt,
        ttft_left_ms=None if spec.ttft_left_s is None else spec.ttft_left_s * 1e3,
        likely_tokens=spec.likely_tokens,
        age_ms=spec.age_s * 1e3,
        preemptions=spec.preemptions,
    )


def spec_from_wire(message: wire.SequenceSpec) -> SequenceSpec:
    """Raises InvalidArgument for what no router of ours sends."""
    deadline_ms = _time_of(message, "deadline_ms")
    ttft_left_ms = _time_of(message, "ttft_left_ms", negative=True)  # the first token may be late already
    if len(message.attempt) != 16:
        raise InvalidArgument("spec.attempt", f"has {len(message.attempt)} bytes, not 16")
    if not message.prompt_tokens:
        raise InvalidArgument("spec.prompt_tokens", "is empty")
    if message.max_tokens <= len(message.output_tokens):
        raise InvalidArgument("spec.max_tokens", f"{message.max_tokens} leaves nothing to generate")
    return SequenceSpec(
        attempt=message.attempt,
        request_id=message.request_id,
        prompt=tuple(message.prompt_tokens),
        sampling=sampling_from_wire(message.sampling),
        max_tokens=message.max_tokens,
        router=process_from_wire(message.router),
        output=tuple(message.output_tokens),
        stop_token_ids=frozenset(message.stop_token_ids),
        eos_token_ids=frozenset(message.eos_token_ids),
        objectives=Objectives(
            _time_of(message.slo, "ttft_ms", "slo."),
            _time_of(message.slo, "tpot_ms", "slo."),
        ),
        priority=message.priority,
        deadline_s=None if deadline_ms is None else deadline_ms / 1e3,
        tenant_salt=message.tenant_salt,
        ttft_left_s=None if ttft_left_ms is None else ttft_left_ms / 1e3,
        likely_tokens=message.likely_tokens,
        age_s=_duration(message.age_ms, "spec.age_ms") / 1e3,
        preemptions=message.preemptions,
    )


def _time_of(message: Any, name: str, parent: str = "", *, negative: bool = False) -> float | None:
    """A field of a spec, in its own unit; None without one. Raises InvalidArgument for a value that is no time."""
    if not message.HasField(name):
        return None
    value: float = getattr(message, name)
    if negative and isfinite(value):
        return value
    return _duration(value, f"spec.{parent}{name}", "time" if negative else "duration")


def _duration(value: float, field: str, kind: str = "duration") -> float:
    if not isfinite(value) or value < 0:
        raise InvalidArgument(field, f"{value:g} is no {kind}")
    return value


def sane(value: float) -> float:
    """What no worker of ours sends (negative, not finite) counts as 0."""
    return value if isfinite(value) and value > 0 else 0.0


def retry_after_from_wire(message: wire.HandoffFailed | transfer.Refused) -> float | None:
    """In seconds. What no worker of ours sends (negative, not finite) counts as absent."""
    value = message.retry_after_ms if message.HasField("retry_after_ms") else -1.0
    return value / 1e3 if isfinite(value) and value >= 0 else None


def logprobs_to_wire(logprobs: TokenLogprobs) -> gen.TokenLogprobs:
    return gen.TokenLogprobs(
        logprob=logprobs.logprob, top=[gen.Alternative(id=token, logprob=value) for token, value in logprobs.top]
    )


def logprobs_from_wire(message: gen.TokenLogprobs) -> TokenLogprobs:
    return TokenLogprobs(message.logprob, tuple((entry.id, entry.logprob) for entry in message.top))


def refusal_from_wire(reason: int) -> RefusalReason:
    """A reason that this process does not know reads as UNSPECIFIED."""
    try:
        return RefusalReason(reason)
    except ValueError:
        return RefusalReason.UNSPECIFIED


def cost_to_wire(cost: StepCost, error: float, chunk_tokens: int) -> wire.StepCost:
    return wire.StepCost(**asdict(cost), error=error, chunk_tokens=chunk_tokens)


def cost_from_wire(message: wire.StepCost) -> StepCost:
    """What no worker of ours sends (negative, not finite) counts as 0."""
    return StepCost(
        sane(message.chunk),
        sane(message.per_token),
        sane(message.per_pair),
        sane(message.step),
        sane(message.per_sequence),
        sane(message.per_resident),
        sane(message.mixed) or 1.0,
    )


def layout_to_wire(layout: KvLayout) -> wire.KvLayout:
    return wire.KvLayout(**asdict(layout))


def layout_from_wire(message: wire.KvLayout) -> KvLayout:
    """Raises Mismatch where it is no layout at all."""
    try:
        return KvLayout(**{field.name: getattr(message, field.name) for field in wire.KvLayout.DESCRIPTOR.fields})
    except ValueError as error:
        raise Mismatch("kv_layout", "a valid layout", str(error)) from None


def card_to_wire(card: ModelCard) -> wire.ModelCard:
    own = {field.name: getattr(card, field.name) for field in fields(ModelCard) if field.name != "kv_layout"}
    return wire.ModelCard(kv_layout=layout_to_wire(card.kv_layout), **own)


def card_from_wire(message: wire.ModelCard) -> ModelCard:
    """Raises Mismatch where its layout is none."""
    own = {field.name: getattr(message, field.name) for field in fields(ModelCard)}
    return ModelCard(
        **own
        | {
            "eos_token_ids": tuple(sorted(message.eos_token_ids)),
            "bos_token_id": message.bos_token_id if message.HasField("bos_token_id") else None,
            "kv_layout": layout_from_wire(message.kv_layout),
        }
    )
