"""The one table between the exception tree and gRPC status codes, in both directions.

Rich details are filled here and nowhere else: ErrorInfo (domain `baton`, the exception's name as the reason),
BadRequest with the field's name, RetryInfo with the time after which to try again.

A status travels in HTTP/2 trailers, which gRPC bounds at 8 KB: beyond that the peer sees a broken stream instead of the
error. So every text in it is bounded, whatever it repeats of what a peer has sent.
"""

from __future__ import annotations

import asyncio
from typing import Any, NoReturn

import grpc
import structlog
from google.protobuf import any_pb2
from google.protobuf.duration_pb2 import Duration
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from baton import errors
from baton.telemetry import printable

DOMAIN = "baton"
MESSAGE_BYTES, VALUE_BYTES = 512, 192
"""Of UTF-8: percent-encoded in one trailer, and in base64 in another, all texts of a status take less than 5 KB."""
KINDS: dict[str, type[errors.BatonError]] = {
    kind.__name__: kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, errors.BatonError)
}
CODES: list[tuple[type[errors.BatonError], grpc.StatusCode]] = [
    (errors.InvalidArgument, grpc.StatusCode.INVALID_ARGUMENT),
    (errors.Unimplemented, grpc.StatusCode.UNIMPLEMENTED),
    (errors.NotFound, grpc.StatusCode.NOT_FOUND),
    (errors.Mismatch, grpc.StatusCode.FAILED_PRECONDITION),
    (errors.ResourceExhausted, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (errors.Unavailable, grpc.StatusCode.UNAVAILABLE),
    (errors.DeadlineExceeded, grpc.StatusCode.DEADLINE_EXCEEDED),
    (errors.Cancelled, grpc.StatusCode.CANCELLED),
    (errors.TransferError, grpc.StatusCode.ABORTED),
    (errors.ConfigError, grpc.StatusCode.FAILED_PRECONDITION),
    (errors.Internal, grpc.StatusCode.INTERNAL),
]
log = structlog.get_logger(__name__)


def code_of(error: errors.BatonError) -> grpc.StatusCode:
    return next((code for kind, code in CODES if isinstance(error, kind)), grpc.StatusCode.INTERNAL)


def number_of(error: errors.BatonError) -> int:
    return int(code_pb2.Code.Value(code_of(error).name))


def error_of_code(number: int, message: str) -> errors.BatonError:
    kind = next((kind for kind, code in CODES if code.value[0] == number), errors.Internal)
    return _rebuild(kind, message, "", None, {})


def bounded(text: str, limit: int = MESSAGE_BYTES) -> str:
    """The text, printable, in at most `limit` bytes; what is too much is cut out of its middle."""
    if len(text) > 2 * limit:
        text = text[:limit] + text[-limit:]  # the middle, which is not even looked at
    raw = printable(text).encode()
    if len(raw) <= limit:
        return raw.decode()
    tail = limit // 4
    head = limit - tail - len("...")
    return f"{raw[:head].decode(errors='ignore')}...{raw[-tail:].decode(errors='ignore')}"


def to_status(error: errors.BatonError) -> status_pb2.Status:
    message = bounded(str(error))
    metadata = {}
    details: list[Any] = []
    if isinstance(error, errors.FieldError) and error.field:
        field, description = bounded(error.field, VALUE_BYTES), bounded(error.message)
        message, metadata["field"] = f"{field}: {description}", field
        violation = error_details_pb2.BadRequest.FieldViolation(field=field, description=description)
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if isinstance(error, errors.Mismatch):
        differs = {"field": error.field, "ours": error.ours, "theirs": error.theirs}
        metadata |= {name: bounded(value, VALUE_BYTES) for name, value in differs.items()}
    if isinstance(error, errors.Retryable):
        if error.constraint:
            metadata["constraint"] = bounded(error.constraint, VALUE_BYTES)
        if error.retry_after_s is not None:
            delay = Duration()
            delay.FromNanoseconds(int(error.retry_after_s * 1e9))
            details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    details.insert(0, error_details_pb2.ErrorInfo(reason=type(error).__name__, domain=DOMAIN, metadata=metadata))
    status = status_pb2.Status(code=number_of(error), message=message)
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    return status


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: BaseException) -> NoReturn:
    """Ends the call with the error's status. A foreign exception is logged here; the peer sees INTERNAL. Raises
    CancelledError where the peer went away meanwhile, as when its deadline passed too."""
    if not isinstance(error, errors.BatonError):
        log.error("unexpected error in a call", exc_info=error)
        error = errors.Internal("internal error; the log has the details")
    try:
        await context.abort_with_status(rpc_status.to_status(to_status(error)))
    except grpc.aio.InternalError as failed:  # the call is over already, as after its client's deadline
        raise asyncio.CancelledError(f"the peer can't be told: {error}") from failed
    raise AssertionError("abort returns never")


def from_rpc_error(error: grpc.aio.AioRpcError) -> errors.BatonError:
    """The exception that the peer raised, as far as the status tells."""
    message = error.details() or error.code().name
    kind = next((kind for kind, code in CODES if code == error.code()), errors.Internal)
    field, retry, metadata = "", None, {}
    try:
        status = rpc_status.from_call(error)
    except ValueError:  # an intermediary's details contradict the code: the code stands
        status = None
    for detail in status.details if status else []:
        if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
            info = error_details_pb2.ErrorInfo()
            detail.Unpack(info)
            metadata = dict(info.metadata)
            field = metadata.get("field", "")
            kind = KINDS.get(info.reason, kind) if info.domain == DOMAIN else kind  # it may say more than the code
        elif detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
            info = error_details_pb2.RetryInfo()
            detail.Unpack(info)
            retry = info.retry_delay.ToNanoseconds() / 1e9
    return _rebuild(kind, message, field, retry, metadata)


def _rebuild(
    kind: type[errors.BatonError], message: str, field: str, retry: float | None, metadata: dict[str, str]
) -> errors.BatonError:
    if issubclass(kind, errors.FieldError):
        return kind(field, message.removeprefix(f"{field}: "))
    if issubclass(kind, errors.Mismatch):
        return errors.Mismatch(field, metadata.get("theirs", ""), metadata.get("ours", ""), message)
    if issubclass(kind, errors.Retryable):
        return kind(message, retry, metadata.get("constraint", ""))
    return kind(message)


async def call(awaitable: Any, timeout: float) -> Any:
    """Awaits a unary call and raises our exceptions for its failures. `timeout` in seconds bounds it in any case."""
    try:
        async with asyncio.timeout(timeout):
            return await awaitable
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error) from None
    except TimeoutError:
        raise errors.DeadlineExceeded(f"no answer within {timeout:g} s") from None
