"""Where workers join: `baton.v1.Registry`, the edge between its messages and the registry."""

from __future__ import annotations

import re
from collections.abc import Coroutine
from typing import Any, TypeVar

from baton.errors import BatonError, ConfigError, InvalidArgument, Mismatch
from baton.model import ModelCard
from baton.rpc.convert import ROLE_NAMES, card_from_wire, process_from_wire, process_to_wire
from baton.rpc.net import parse_address
from baton.rpc.status import abort
from baton.spec import ProcessRef
from baton.v1 import worker_pb2 as wire
from baton.v1.worker_pb2_grpc import RegistryServicer
from router.workers.registry import Registry
from router.workers.worker import Registration

T = TypeVar("T")


class RegistryService(RegistryServicer):
    """Registration, renewal and leave of workers."""

    def __init__(self, registry: Registry, router: ProcessRef) -> None:
        self._registry, self._router = registry, router

    async def Register(self, request: wire.RegisterRequest, context: Any) -> wire.RegisterResponse:
        """FAILED_PRECONDITION names the field and both values when the model is not that of the others;
        INVALID_ARGUMENT the name when a live worker has it."""

        async def register() -> wire.RegisterResponse:
            await self._registry.register(read_registration(request))
            return wire.RegisterResponse(router=process_to_wire(self._router), lease_ms=self._lease_ms)

        return await _answer(register(), context)

    async def Renew(self, request: wire.RenewRequest, context: Any) -> wire.RenewResponse:
        """NOT_FOUND asks the worker to register again."""

        async def renew() -> wire.RenewResponse:
            self._registry.renew(process_from_wire(request.worker))
            return wire.RenewResponse(lease_ms=self._lease_ms, router=process_to_wire(self._router))

        return await _answer(renew(), context)

    async def Deregister(self, request: wire.DeregisterRequest, context: Any) -> wire.DeregisterResponse:
        """Idempotent."""
        self._registry.deregister(process_from_wire(request.worker))
        return wire.DeregisterResponse()

    @property
    def _lease_ms(self) -> int:
        return round(self._registry.lease_s * 1e3)


async def _answer(work: Coroutine[Any, Any, T], context: Any) -> T:
    try:
        return await work
    except BatonError as error:
        await abort(context, error)


def read_registration(message: wire.RegisterRequest) -> Registration:
    """Raises InvalidArgument with the path of a field that makes no sense."""
    process = process_from_wire(message.worker)
    _require(bool(process.name), "worker.name", "must not be empty")
    _require(bool(process.incarnation), "worker.incarnation", "must not be empty")
    try:
        parse_address(process.address)
    except ConfigError as error:
        raise InvalidArgument("worker.address", str(error)) from None
    for index, role in enumerate(message.roles):
        _require(role in ROLE_NAMES, f"roles[{index}]", f"{role} is not a role")
    _require(bool(message.roles), "roles", "must not be empty")
    _require(message.capacity.blocks > 0, "capacity.blocks", "must be at least 1")
    _require(message.capacity.max_sequences > 0, "capacity.max_sequences", "must be at least 1")
    return Registration(
        process,
        frozenset(ROLE_NAMES[role] for role in message.roles),
        _read_card(message.model),
        message.capacity.blocks,
        message.capacity.max_sequences,
        tuple(message.transports),
    )


def _read_card(card: wire.ModelCard) -> ModelCard:
    _require(bool(card.name), "model.name", "must not be empty")
    _require(bool(card.fingerprint), "model.fingerprint", "must not be empty")
    _require(card.context_tokens > 1, "model.context_tokens", "must be at least 2")
    _require(card.vocabulary_size > 0, "model.vocabulary_size", "must be at least 1")
    _require(card.kv_layout.block_tokens > 0, "model.kv_layout.block_tokens", "must be at least 1")
    _require(_is_digest(card.tokenizer_sha256), "model.tokenizer_sha256", "must be a SHA-256 in hexadecimal")
    _require(
        not card.chat_template_sha256 or _is_digest(card.chat_template_sha256),
        "model.chat_template_sha256",
        "must be a SHA-256 in hexadecimal, or empty",
    )
    try:
        return card_from_wire(card)
    except Mismatch as error:
        raise InvalidArgument("model.kv_layout", error.ours) from None


def _is_digest(text: str) -> bool:
    return re.fullmatch("[0-9a-f]{64}", text) is not None


def _require(condition: bool, field: str, message: str) -> None:
    if not condition:
        raise InvalidArgument(field, message)
