"""From what the state machines say to what clients are sent."""

from __future__ import annotations

from baton.rpc.convert import logprobs_to_wire
from baton.spec import SequenceSpec
from baton.v1 import generation_pb2 as gen
from router.placement import Plan
from router.streams import Piece
from router.timeline import Outcome


def accepted(spec: SequenceSpec, model: str, plan: Plan) -> gen.GenerateResponse:
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
    )


def tokens(piece: Piece) -> gen.GenerateResponse:
    """New output."""
    return gen.GenerateResponse(
        tokens=gen.Tokens(
            position=piece.position, ids=piece.ids, text=piece.text, logprobs=map(logprobs_to_wire, piece.logprobs)
        )
    )


def finished(outcome: Outcome) -> gen.GenerateResponse:
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
    )


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
