"""From the workers' messages to what the state machines see."""

from __future__ import annotations

from baton import errors
from baton.rpc.status import CODES
from baton.v1 import worker_pb2 as wire
from router.requests.attempt import End
from router.requests.handoff import Refusal
from router.requests.timeline import PrefillTimes, Reason


def read_times(message: wire.PrefillReport) -> PrefillTimes:
    """See `PrefillTimes`."""
    return PrefillTimes(
        queue_ms=message.queue_ms,
        prefill_ms=message.prefill_ms,
        transfer_ms=message.transfer_ms if message.HasField("transfer_ms") else None,
        transfer_exposed_ms=message.transfer_exposed_ms if message.HasField("transfer_exposed_ms") else None,
        transport=message.transport,
        transfer_bytes=message.transfer_bytes,
        transfer_blocks=message.transfer_blocks,
        transfer_cached_blocks=message.transfer_cached_blocks,
        cached_tokens=message.cached_tokens,
    )


def read_end(message: wire.Ended) -> End:
    """See `End`. A reason that this router does not know reads as none."""
    known = message.reason in {reason.value for reason in Reason}
    return End(
        reason=Reason(message.reason) if known else None,
        error=read_error(message.status, message.message) if message.HasField("status") and message.status else None,
        output_tokens=message.output_tokens,
        first_step_wait_ms=message.first_step_wait_ms if message.HasField("first_step_wait_ms") else None,
        decode_ms=message.decode_ms if message.HasField("decode_ms") else None,
    )


def read_refusal(reason: int) -> Refusal:
    """A reason that this router does not know reads as UNSPECIFIED."""
    return Refusal(reason) if reason in {refusal.value for refusal in Refusal} else Refusal.UNSPECIFIED


def read_error(status: int, message: str) -> errors.BatonError:
    """The error that stands for a gRPC status code."""
    kind = next((kind for kind, code in CODES if code.value[0] == status), errors.Internal)
    if issubclass(kind, errors.FieldError):
        return kind("", message)
    if issubclass(kind, errors.Mismatch):
        return errors.Mismatch("", "", "", message)
    return kind(message)
