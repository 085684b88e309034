"""The client: one channel to a router, and a method for each call that it serves.

Failures come as the exceptions of `baton.errors`: InvalidArgument and Unimplemented name the field, ResourceExhausted
and Unavailable may say after how many seconds to try again.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from math import inf
from types import TracebackType
from typing import Any, Self, Unpack

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from baton.client import wire
from baton.client.reports import ModelInfo, Placement, ProcessStatus, WorkerList
from baton.client.types import Accepted, Completion, Event, Finished, Message, RequestOptions, Tokenization, Tokens
from baton.config import LONGEST_S
from baton.errors import BatonError, DeadlineExceeded, Internal, InvalidArgument, NotFound, Unavailable
from baton.rpc.net import open_client_channel, parse_address
from baton.rpc.status import from_rpc_error
from baton.v1 import admin_pb2, admin_pb2_grpc, generation_pb2, generation_pb2_grpc

CALL_TIMEOUT_S = 10.0
"""Bounds every call but `generate` and `complete`. A call's own `timeout` in seconds is taken as there."""


class Client:
    """An async client of one Baton process; `async with` closes it.

    Use it in the event loop that it was made in. Connects on the first call. `address` is HOST:PORT, and ConfigError
    says so when it is not. Concurrent calls share one connection.
    """

    def __init__(self, address: str = "127.0.0.1:9700") -> None:
        parse_address(address)
        self.address = address
        self._channel = open_client_channel(address)
        self._generation: generation_pb2_grpc.GenerationAsyncStub = generation_pb2_grpc.GenerationStub(self._channel)
        self._admin: admin_pb2_grpc.AdminAsyncStub = admin_pb2_grpc.AdminStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends the connection, and with it every call in progress. Idempotent."""
        await self._channel.close()

    async def generate(
        self, prompt: str | None = None, *, timeout: float | None = None, **options: Unpack[RequestOptions]
    ) -> AsyncGenerator[Event, None]:
        """One Accepted, any number of Tokens, one Finished; after that, or at the first failure, the stream is over.

        Exactly one of `prompt`, `messages` and `token_ids`. Leaving the loop cancels the request on the server;
        `contextlib.aclosing` does it at a definite point. `timeout` in seconds bounds the whole stream; without it, or
        when it is infinite, the server's own limit does. InvalidArgument names a timeout that is not above 0.
        """
        timeout = deadline_of(timeout)
        call = self._generation.Generate(wire.request_to_wire(prompt, options), timeout=timeout)
        try:
            async for message in call:
                event = wire.event_from_wire(message)
                if event is not None:
                    yield event
        except grpc.aio.AioRpcError as error:
            raise _explain(error, self.address, timeout) from None
        finally:
            call.cancel()  # does nothing to a call that is over

    async def complete(
        self, prompt: str | None = None, *, timeout: float | None = None, **options: Unpack[RequestOptions]
    ) -> Completion:
        """The whole answer at once; arguments and exceptions as for `generate`."""
        accepted: Accepted | None = None
        finished: Finished | None = None
        runs: list[Tokens] = []
        async for event in self.generate(prompt, timeout=timeout, **options):
            match event:
                case Accepted():
                    accepted = event
                case Tokens():
                    runs.append(event)
                case Finished():
                    finished = event
        if accepted is None or finished is None:
            raise Internal("the server ended the stream without a result")
        return Completion(
            text="".join(run.text for run in runs),
            token_ids=tuple(token for run in runs for token in run.ids),
            logprobs=tuple(entry for run in runs for entry in run.logprobs),
            accepted=accepted,
            finished=finished,
        )

    async def tokenize(
        self,
        prompt: str | None = None,
        *,
        messages: list[Message] | None = None,
        model: str = "",
        timeout: float = CALL_TIMEOUT_S,
    ) -> Tokenization:
        """The token ids that `generate` would use. Exactly one of `prompt` and `messages`."""
        answer = await self._call(self._generation.Tokenize, wire.tokenize_to_wire(prompt, messages, model), timeout)
        return Tokenization(tuple(answer.ids), answer.text)

    async def models(self, *, timeout: float = CALL_TIMEOUT_S) -> list[ModelInfo]:
        """What the registered workers serve."""
        answer = await self._call(self._generation.ListModels, generation_pb2.ListModelsRequest(), timeout)
        return [wire.model_from_wire(entry) for entry in answer.models]

    async def workers(self, *, timeout: float = CALL_TIMEOUT_S) -> WorkerList:
        """The workers that a router knows; Unimplemented when the process at the other end is a worker."""
        answer = await self._call(self._admin.ListWorkers, admin_pb2.ListWorkersRequest(), timeout)
        return wire.workers_from_wire(answer)

    async def status(self, *, timeout: float = CALL_TIMEOUT_S) -> ProcessStatus:
        """What the process at the other end holds; routers and workers alike."""
        answer = await self._call(self._admin.GetStatus, admin_pb2.GetStatusRequest(), timeout)
        return wire.status_from_wire(answer)

    async def explain(
        self, request_id: str, *, tenant_salt: str = "", timeout: float = CALL_TIMEOUT_S
    ) -> tuple[Placement, ...]:
        """The decisions about a request. Raises NotFound for one that the router has not placed, or has forgotten."""
        request = admin_pb2.ExplainRequest(request_id=request_id, tenant_salt=tenant_salt)
        answer = await self._call(self._admin.Explain, request, timeout)
        return tuple(map(wire.placement_from_wire, answer.placements))

    async def health(self, service: str = "", *, timeout: float = CALL_TIMEOUT_S) -> str:
        """ "serving", "not_serving", or "service_unknown" for a name that the process does not know."""
        stub = health_pb2_grpc.HealthStub(self._channel)
        try:
            answer = await self._call(stub.Check, health_pb2.HealthCheckRequest(service=service), timeout)
        except NotFound:
            return "service_unknown"
        name: str = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
        return name.lower()

    async def _call(self, method: Any, request: Any, timeout: float) -> Any:
        """A unary call with its deadline and our exceptions."""
        limit = deadline_of(timeout)
        try:
            return await method(request, timeout=limit)
        except grpc.aio.AioRpcError as error:
            raise _explain(error, self.address, limit) from None


def deadline_of(timeout: float | None) -> float | None:
    """The seconds to give to gRPC, where 0 means no deadline and a huge number one that has passed. None and infinite
    set no deadline; more than a week counts as a week. Raises InvalidArgument for what is not above 0."""
    if timeout is None or timeout == inf:
        return None
    if not timeout > 0:
        raise InvalidArgument("timeout", f"must be positive, in seconds, not {timeout:g}")
    return min(timeout, LONGEST_S)


def _explain(error: grpc.aio.AioRpcError, address: str, timeout: float | None) -> BatonError:
    """The server's exception, or, where gRPC itself failed, one in the caller's terms."""
    failure = from_rpc_error(error)
    if any(key == "grpc-status-details-bin" for key, _ in error.trailing_metadata() or ()):
        return failure
    if isinstance(failure, Unavailable):
        return Unavailable(f"cannot reach {address}: {_cause(str(failure))}")
    if isinstance(failure, DeadlineExceeded) and timeout is not None:
        return DeadlineExceeded(f"no result from {address} within {timeout:g} s")
    if error.code() == grpc.StatusCode.UNIMPLEMENTED:
        return InvalidArgument("", f"{address} does not offer this: {failure}")
    return failure


def _cause(details: str) -> str:
    """The informative part of gRPC's connection error."""
    text = details.rpartition("last error: ")[2]
    for known in ("Connection refused", "Socket closed", "DNS resolution failed"):
        if known.lower() in text.lower():
            return known.lower() if known != "DNS resolution failed" else "no such host"
    return text.rpartition(": ")[2] if "ipv4:" in text or "ipv6:" in text else text
