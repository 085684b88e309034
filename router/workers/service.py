"""`baton.v1.Registry`: the edge between its messages and the registry."""

from __future__ import annotations

import re
from typing import Any

from baton.errors import BatonError, ConfigError, InvalidArgument, Mismatch
from baton.rpc.convert import ROLE_NAMES, card_from_wire, process_from_wire, process_to_wire
from baton.rpc.greeting import agree_on_version
from baton.rpc.net import parse_address
from baton.rpc.status import abort
from baton.spec import ProcessRef
from baton.v1 import worker_pb2 as wire
from baton.v1.worker_pb2_grpc import RegistryServicer
from router.workers.registry import Registry
from router.workers.worker import Registration

DIGEST = re.compile("[0-9a-f]{64}")
NAME_BYTES, FINGERPRINT_BYTES = 256, 1024
TRANSPORTS, ROLE_ENTRIES, EOS_TOKENS = 16, 16, 256


class RegistryService(RegistryServicer):
    def __init__(self, registry: Registry, router: ProcessRef) -> None:
        self._registry, self._router = registry, router

    async def Register(self, request: wire.RegisterRequest, context: Any) -> wire.RegisterResponse:
        """FAILED_PRECONDITION, with the field and both values, where the protocol's version or the model differs from
        that of other workers; INVALID_ARGUMENT where a live worker has the name or another process the address."""
        try:
            version = agree_on_version(request)
            await self._registry.register(read_registration(request))
        except BatonError as error:
            await abort(context, error)
        router = process_to_wire(self._router)
        return wire.RegisterResponse(router=router, lease_ms=self._lease_ms, version=version)

    async def Renew(self, request: wire.RenewRequest, context: Any) -> wire.RenewResponse:
        """NOT_FOUND asks the worker to register again. INVALID_ARGUMENT where another process has the address."""
        try:
            self._registry.renew(process_from_wire(request.worker))
        except BatonError as error:
            await abort(context, error)
        return wire.RenewResponse(lease_ms=self._lease_ms, router=process_to_wire(self._router))

    async def Deregister(self, request: wire.DeregisterRequest, context: Any) -> wire.DeregisterResponse:
        self._registry.deregister(process_from_wire(request.worker))
        return wire.DeregisterResponse()

    @property
    def _lease_ms(self) -> int:
        return round(self._registry.lease_s * 1e3)


def read_registration(message: wire.RegisterRequest) -> Registration:
    """Raises InvalidArgument with the path of the first field that makes no sense."""
    process, card = process_from_wire(message.worker), message.model
    empty, one = "must not be empty", "must be at least 1"
    _check_sizes(message)
    _require(("worker.name", process.name, empty), ("worker.incarnation", process.incarnation, empty))
    try:
        parse_address(process.address)
    except ConfigError as error:
        raise InvalidArgument("worker.address", str(error)) from None
    _require(
        *((f"roles[{index}]", role in ROLE_NAMES, f"{role} is not a role") for index, role in enumerate(message.roles)),
        ("roles", message.roles, empty),
        ("capacity.blocks", message.capacity.blocks, one),
        ("capacity.max_sequences", message.capacity.max_sequences, one),
        ("model.name", card.name, empty),
        ("model.fingerprint", card.fingerprint, empty),
        ("model.context_tokens", card.context_tokens > 1, "must be at least 2"),
        ("model.vocabulary_size", card.vocabulary_size, one),
        ("model.kv_layout.block_tokens", card.kv_layout.block_tokens, one),
        ("model.tokenizer_sha256", DIGEST.fullmatch(card.tokenizer_sha256), "must be a SHA-256 in hexadecimal"),
        (
            "model.chat_template_sha256",
            not card.chat_template_sha256 or DIGEST.fullmatch(card.chat_template_sha256),
            "must be a SHA-256 in hexadecimal, or empty",
        ),
    )
    try:
        model = card_from_wire(card)
    except Mismatch as error:
        raise InvalidArgument("model.kv_layout", error.ours) from None
    return Registration(
        process,
        frozenset(ROLE_NAMES[role] for role in message.roles),
        model,
        message.capacity.blocks,
        message.capacity.max_sequences,
        tuple(message.transports),
    )


def _check_sizes(message: wire.RegisterRequest) -> None:
    """The router keeps these texts, and repeats them to every client."""
    worker, card = message.worker, message.model
    texts = {f"worker.{name}": getattr(worker, name) for name in ("name", "incarnation", "address")}
    texts |= {f"model.{name}": getattr(card, name) for name in ("name", "bos_token", "eos_token")}
    texts |= {f"transports[{index}]": name for index, name in enumerate(message.transports[: TRANSPORTS + 1])}
    limits = {"transports": TRANSPORTS, "roles": ROLE_ENTRIES}
    _require(
        *((field, len(text.encode()) <= NAME_BYTES, f"at most {NAME_BYTES} bytes") for field, text in texts.items()),
        *((name, len(getattr(message, name)) <= most, f"at most {most}") for name, most in limits.items()),
        ("model.fingerprint", len(card.fingerprint) <= FINGERPRINT_BYTES, f"at most {FINGERPRINT_BYTES} characters"),
        ("model.eos_token_ids", len(card.eos_token_ids) <= EOS_TOKENS, f"at most {EOS_TOKENS}"),
    )


def _require(*rows: tuple[str, object, str]) -> None:
    """Raises InvalidArgument for the first (field, good, message) that is not good."""
    for field, good, message in rows:
        if not good:
            raise InvalidArgument(field, message)
