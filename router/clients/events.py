"""From what the state machines say to what clients are sent."""

from __future__ import annotations

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from baton.rpc.convert import logprobs_to_wire
from baton.spec import SequenceSpec
from baton.v1 import generation_pb2 as gen
from router.placement.policy import Plan
from router.requests.streams import Piece
from router.requests.timeline import Outcome


def _key(message: type[Message], field: str) -> bytes:
    """What stands before a field on the wire: its number, and whether a varint (0) or a length (2) follows."""
    found = message.DESCRIPTOR.fields_by_name[field]
    return bytes([found.number << 3 | (2 if found.is_packed or found.type in _WITH_LENGTH else 0)])


_WITH_LENGTH = (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_MESSAGE)
_TOKENS = _key(gen.GenerateResponse, "tokens")
_POSITION, _IDS, _TEXT = (_key(gen.Tokens, field) for field in ("position", "ids", "text"))
_BYTES = [bytes([value]) for value in range(256)]


def accepted(spec: SequenceSpec, model: str, plan: Plan) -> bytes:
    """The first event, the promise. Predictions are absent, not zero, while the router makes none."""
    return gen.GenerateResponse(
        accepted=gen.Accepted(
            request_id=spec.request_id,
            model=model,
            seed=spec.sampling.seed,
            prompt_tokens=len(spec.prompt),
            max_tokens=spec.max_tokens,
            predicted_ttft_ms=None if plan.ttft_s is None else plan.ttft_s * 1e3,
            predicted_tpot_ms=None if plan.tpot_s is None else plan.tpot_s * 1e3,
        )
    ).SerializeToString()


def tokens(piece: Piece) -> bytes:
    """New output. Written out by hand: once per token, and 2.4 us where protobuf's own objects take 6.3."""
    if piece.logprobs:
        scores = map(logprobs_to_wire, piece.logprobs)
        message = gen.Tokens(position=piece.position, ids=piece.ids, text=piece.text, logprobs=scores)
        return gen.GenerateResponse(tokens=message).SerializeToString()
    parts = [_POSITION, _varint(piece.position)] if piece.position else []
    if piece.ids:
        ids = b"".join(map(_varint, piece.ids))
        parts += (_IDS, _varint(len(ids)), ids)
    if piece.text:
        text = piece.text.encode()
        parts += (_TEXT, _varint(len(text)), text)
    body = b"".join(parts)
    return b"".join((_TOKENS, _varint(len(body)), body))


def finished(outcome: Outcome) -> bytes:
    """The last event."""
    return gen.GenerateResponse(
        finished=gen.Finished(
            reason=gen.FinishReason.ValueType(outcome.reason.value),
            usage=gen.Usage(
                prompt_tokens=outcome.prompt_tokens,
                output_tokens=outcome.output_tokens,
                cached_prompt_tokens=_cached(outcome),
            ),
            timeline=_timeline(outcome),
            slo=_slo(outcome),
            stop=outcome.stop,
        )
    ).SerializeToString()


def _varint(number: int) -> bytes:
    """Protobuf's base 128, seven bits a byte, the lowest first."""
    if number < 0x80:
        return _BYTES[number]
    if number < 0x4000:
        return _BYTES[number & 0x7F | 0x80] + _BYTES[number >> 7]
    return _BYTES[number & 0x7F | 0x80] + _varint(number >> 7)


def _slo(outcome: Outcome) -> gen.SloOutcome | None:
    """Absent where the request set no objective."""
    if outcome.objectives.ttft_ms is None and outcome.objectives.tpot_ms is None:
        return None
    return gen.SloOutcome(ttft_kept=outcome.ttft_kept, tpot_kept=outcome.tpot_kept)


def _cached(outcome: Outcome) -> int:
    marks = outcome.marks
    return marks.cached_tokens if marks.prefill is None else marks.prefill.cached_tokens


def _timeline(outcome: Outcome) -> gen.Timeline:
    marks, prefill = outcome.marks, outcome.marks.prefill
    timeline = gen.Timeline(
        ttft_ms=marks.ttft_ms,
        tpot_ms=marks.tpot_ms(outcome.output_tokens),
        total_ms=outcome.total_ms,
        router_ms=0.0 if marks.commanded is None else (marks.commanded - marks.arrived) * 1e3,
        queue_ms=marks.queue_ms,
        first_step_wait_ms=marks.first_step_wait_ms,
        decode_ms=marks.decode_ms,
        attempts=outcome.attempts,
        handoffs=outcome.handoffs,
        prefill_worker=outcome.prefill_worker,
        decode_worker=outcome.decode_worker,
        path=gen.Path.ValueType(outcome.path.value),
        simulated=outcome.simulated,
    )
    if prefill is not None:
        timeline.queue_ms, timeline.prefill_ms = prefill.queue_ms, prefill.prefill_ms
        timeline.transport, timeline.transfer_bytes = prefill.transport, prefill.transfer_bytes
        timeline.transfer_blocks = prefill.transfer_blocks
        timeline.transfer_cached_blocks = prefill.transfer_cached_blocks
        if prefill.transfer_ms is not None:
            timeline.transfer_ms = prefill.transfer_ms
        if prefill.transfer_exposed_ms is not None:
            timeline.transfer_exposed_ms = prefill.transfer_exposed_ms
    return timeline
