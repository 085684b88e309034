"""Errors travel through a real call and come out as what they were."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from baton import errors
from baton.rpc.net import open_channel, service
from baton.rpc.status import CODES, MESSAGE_BYTES, abort, bounded, call, code_of, error_of_code
from baton.v1 import worker_pb2 as wire
from baton.v1.worker_pb2_grpc import RegistryServicer, RegistryStub, add_RegistryServicer_to_server
from tests.rpc.servers import start_server
from tests.texts import ALPHABETS, LONG_TEXTS, assert_small, text_of


class Failing(RegistryServicer):
    """Fails as it is told, or says nothing at all."""

    error: BaseException | None = None

    async def Register(self, request: wire.RegisterRequest, context: Any) -> wire.RegisterResponse:
        if self.error is None:
            await asyncio.Event().wait()
        await abort(context, self.error or errors.Internal("never"))

    async def Renew(self, request: wire.RenewRequest, context: Any) -> wire.RenewResponse:
        raise AssertionError

    async def Deregister(self, request: wire.DeregisterRequest, context: Any) -> wire.DeregisterResponse:
        raise AssertionError


async def raised(error: BaseException) -> grpc.aio.AioRpcError:
    """The call's failure as gRPC tells it."""
    failing = Failing()
    failing.error = error
    server = await start_server("127.0.0.1:0", [service(add_RegistryServicer_to_server, failing, "Registry")])
    try:
        async with open_channel(server.address) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await RegistryStub(channel).Register(wire.RegisterRequest(), timeout=20)
            return caught.value
    finally:
        await server.stop(0)


async def through(error: BaseException) -> errors.BatonError:
    """What the caller gets."""
    failed = await raised(error)

    async def again() -> None:
        raise failed

    with pytest.raises(errors.BatonError) as caught:
        await call(again(), 20)
    return caught.value


SAMPLES: list[errors.BatonError] = [
    errors.InvalidArgument("sampling.top_p", "must be positive"),
    errors.InvalidArgument("", "no field"),
    errors.Unimplemented("slo.policy", "does not work yet"),
    errors.NotFound("no such thing"),
    errors.Mismatch("kv_layout.dtype", "float32", "float16"),
    errors.ResourceExhausted("no room", 0.25, "decode_blocks"),
    errors.ResourceExhausted("never"),
    errors.Unavailable("gone", 1.5),
    errors.DeadlineExceeded("too late"),
    errors.Cancelled("stopped"),
    errors.Internal("our fault"),
    errors.ConfigError("bad flag"),
    errors.ModelFileError("truncated"),
    errors.TransferError("broken"),
    errors.PeerClosed("closed"),
    errors.WriteRefused("refused"),
    errors.WriteRevoked("no such grant"),
    errors.ChecksumMismatch("other bytes: ünïcode"),
]


@pytest.mark.parametrize("error", SAMPLES, ids=lambda error: type(error).__name__)
async def test_an_error_comes_out_as_it_went_in(error: errors.BatonError) -> None:
    found = await through(error)
    assert type(found) is type(error)
    assert str(found) == str(error)
    if isinstance(error, errors.FieldError):
        assert isinstance(found, errors.FieldError)
        assert (found.field, found.message) == (error.field, error.message)
    if isinstance(error, errors.Retryable):
        assert isinstance(found, errors.Retryable)
        assert (found.retry_after_s, found.constraint) == (error.retry_after_s, error.constraint)
    if isinstance(error, errors.Mismatch):
        assert isinstance(found, errors.Mismatch)
        # As the other side sees it.
        assert (found.field, found.ours, found.theirs) == (error.field, error.theirs, error.ours)


def test_every_error_class_has_a_sample_and_a_code() -> None:
    kinds = {kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.BatonError)}
    kinds -= {errors.BatonError, errors.FieldError, errors.Retryable}
    assert kinds == {type(error) for error in SAMPLES}
    assert all(any(issubclass(kind, known) for known, _ in CODES) for kind in kinds)
    assert code_of(errors.BatonError("?")) is grpc.StatusCode.INTERNAL


def long_errors(text: str) -> list[errors.BatonError]:
    """One of each form, with the text wherever one can be."""
    return [
        errors.InvalidArgument(text, text),
        errors.Mismatch(text, text, text),
        errors.Mismatch("f", text, text, text),
        errors.ResourceExhausted(text, 0.25, text),
        errors.NotFound(text),
        error_of_code(13, text),
    ]


@pytest.mark.parametrize("text", [*LONG_TEXTS.values(), "\ud800" * 9_000], ids=[*LONG_TEXTS, "surrogates"])
async def test_an_error_with_a_long_text_arrives_all_the_same(text: str) -> None:
    for error in long_errors(text):
        found = await raised(error)
        assert found.code() is code_of(error)
        assert_small(found)
        assert type(await through(error)) is type(error)


@pytest.mark.parametrize("alphabet", ALPHABETS)
@pytest.mark.parametrize("size", [0, 1, 500, 509, 510, 511, 512, 513, 514, 515, 516, 1023, 1024, 1025, 1026, 5000])
def test_a_text_is_cut_between_characters(alphabet: str, size: int) -> None:
    found = bounded(text_of(alphabet, size))
    assert len(found.encode()) <= MESSAGE_BYTES
    assert found.isprintable()
    assert len(found.encode()) > MESSAGE_BYTES - 8 or "..." not in found
    assert bounded(found) == found


def test_a_short_text_stays_as_it_is() -> None:
    assert bounded("sampling.top_p: must be at most 1, not 2 (ünïcode 😀)") == (
        "sampling.top_p: must be at most 1, not 2 (ünïcode 😀)"
    )
    assert bounded("a\nb\x00c\u202ed\ud800") == "a\\nb\\x00c\\u202ed\\ud800"
    assert bounded("ab" * 300, 12) == "ababab...bab"


async def test_foreign_clients_get_the_standard_details() -> None:
    status = rpc_status.from_call(await raised(errors.InvalidArgument("prompt", "is empty")))
    assert status is not None
    info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    assert status.details[0].Unpack(info)
    assert status.details[1].Unpack(bad)
    assert (info.domain, info.reason, dict(info.metadata)) == ("baton", "InvalidArgument", {"field": "prompt"})
    assert [(v.field, v.description) for v in bad.field_violations] == [("prompt", "is empty")]


async def test_a_call_that_is_over_is_not_answered() -> None:
    """Its client's deadline has passed: that is no fault of ours, to be logged with a traceback."""

    class Over:
        async def abort_with_status(self, status: Any) -> None:
            raise grpc.aio.InternalError("Failed grpc_call_start_batch: 8")

    context: Any = Over()
    with pytest.raises(asyncio.CancelledError):
        await abort(context, errors.DeadlineExceeded("too late"))


async def test_what_is_not_ours_is_not_shown() -> None:
    found = await through(KeyError("secret"))
    assert type(found) is errors.Internal
    assert "secret" not in str(found)


async def test_a_peer_that_is_not_there_is_unavailable() -> None:
    async with open_channel("127.0.0.1:1") as channel:
        with pytest.raises(errors.Unavailable):
            await call(RegistryStub(channel).Register(wire.RegisterRequest()), 20)


async def test_no_answer_in_time_is_deadline_exceeded() -> None:
    server = await start_server("127.0.0.1:0", [service(add_RegistryServicer_to_server, Failing(), "Registry")])
    async with open_channel(server.address) as channel:
        with pytest.raises(errors.DeadlineExceeded, match=r"within 0\.05 s"):
            await call(RegistryStub(channel).Register(wire.RegisterRequest()), 0.05)
    await server.stop(0)
