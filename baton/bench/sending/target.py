"""What a load is aimed at: a model behind an address, over a fixed number of connections that are up beforehand."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass

import grpc

from baton.bench.config import LoadConfig
from baton.client.types import ModelInfo
from baton.client.wire import model_from_wire
from baton.errors import ConfigError, Unavailable
from baton.rpc.net import open_channel, parse_address
from baton.rpc.status import call
from baton.v1 import generation_pb2, generation_pb2_grpc

CONNECT_S = 10.0


@dataclass(frozen=True, slots=True)
class LoadTarget:
    """`async with connect(...)` makes one."""

    address: str
    model: ModelInfo
    channels: tuple[grpc.aio.Channel, ...]


@contextlib.asynccontextmanager
async def connect(address: str, config: LoadConfig) -> AsyncIterator[LoadTarget]:
    """Every channel has answered a call, so that no request pays for connecting.

    Raises ConfigError for an address or a model that can't be, Unavailable when nobody serves there.
    """
    parse_address(address, "server")
    channels = tuple(open_channel(address) for _ in range(config.channels))
    try:
        for channel in channels:
            models = await _models(channel, address)
        yield LoadTarget(address, _chosen(models, config.model), channels)
    finally:
        for channel in channels:
            await channel.close()


async def _models(channel: grpc.aio.Channel, address: str) -> list[ModelInfo]:
    stub: generation_pb2_grpc.GenerationAsyncStub = generation_pb2_grpc.GenerationStub(channel)
    try:
        answer = await call(stub.ListModels(generation_pb2.ListModelsRequest()), CONNECT_S)
    except Unavailable as error:
        raise Unavailable(f"cannot reach {address}: {error}") from None
    return [model_from_wire(entry) for entry in answer.models]


def _chosen(models: list[ModelInfo], name: str) -> ModelInfo:
    if not models:
        raise Unavailable("no worker has joined the router yet")
    found = [entry for entry in models if name in ("", entry.name)]
    if len(found) != 1:
        known = ", ".join(entry.name for entry in models)
        raise ConfigError(f"model: {name!r} is not served; there is {known}" if name else f"model: which of {known}?")
    return found[0]
