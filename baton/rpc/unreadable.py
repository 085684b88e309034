"""Requests whose bytes are no message get INVALID_ARGUMENT.

gRPC answers them with UNKNOWN, which says that the server is at fault, and logs a traceback for each.
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from baton.errors import InvalidArgument
from baton.rpc.status import abort


class RefuseUnreadable(grpc.aio.ServerInterceptor):
    """For calls with one request. A stream of requests that are none ends as gRPC ends it."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler: Any = await continuation(handler_call_details)
        if handler is None or handler.request_streaming or handler.request_deserializer is None:
            return handler
        read, act = handler.request_deserializer, handler.unary_stream or handler.unary_unary

        def attempt(data: bytes) -> Any:
            try:
                return read(data)
            except DecodeError as error:
                return error

        async def answer(request: Any, context: Any) -> Any:
            if isinstance(request, DecodeError):
                await abort(context, InvalidArgument("", f"the request can't be read: {request}"))
            return await act(request, context)

        async def stream(request: Any, context: Any) -> AsyncIterator[Any]:
            if isinstance(request, DecodeError):
                await abort(context, InvalidArgument("", f"the request can't be read: {request}"))
            async for response in act(request, context):
                yield response

        wrapped = stream if inspect.isasyncgenfunction(act) else answer
        make = (
            grpc.unary_stream_rpc_method_handler if handler.response_streaming else grpc.unary_unary_rpc_method_handler
        )
        return make(wrapped, attempt, handler.response_serializer)
