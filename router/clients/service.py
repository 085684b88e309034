"""What clients call: `baton.v1.Generation`."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Coroutine
from concurrent.futures import Executor
from typing import Any, TypeVar

import grpc
from google.protobuf.message import Message

from baton.config import RouterConfig
from baton.errors import BatonError, DeadlineExceeded, ResourceExhausted, Unavailable
from baton.objectives import Defaults
from baton.rpc.status import abort
from baton.spec import ProcessRef, RequestSpec
from baton.v1 import generation_pb2 as gen
from router.clients.events import accepted, finished, tokens
from router.clients.parsing import Unreadable, parser
from router.clients.validation import Checked, check_ids, check_input, check_length, check_request
from router.placement.snapshot import Demand
from router.requests.admitted import Admitted
from router.requests.request import Request
from router.requests.stream import ClientStream, Piece
from router.requests.table import Requests
from router.text.input import Input
from router.text.tokenisation import tokenise
from router.workers.prefixes import digests_of
from router.workers.registry import NO_WORKER_RETRY_S, Registry
from router.workers.served_model import ServedModel

ABORT_S = 2.0
"""How long a client that does not read may take to notice its error."""
TOKENISE_LIMIT = 256
"""Tokenize calls at once; each may hold a message of some megabytes."""
T = TypeVar("T")
M = TypeVar("M", bound=Message)


class GenerationService:
    """Generate, Tokenize and ListModels over a registry and a table of requests."""

    def __init__(
        self,
        config: RouterConfig,
        router: ProcessRef,
        registry: Registry,
        requests: Requests,
        executor: Executor,
    ) -> None:
        self._config, self._router = config, router
        self._registry, self._requests, self._executor = registry, requests, executor
        self._defaults = Defaults(config.slo)
        self._tokenising = 0

    async def Generate(self, request: gen.GenerateRequest | Unreadable, context: Any) -> None:
        """Streams Accepted, Tokens and Finished; ends with a status that says what went wrong."""
        arrived = asyncio.get_running_loop().time()
        await _answer(self._generate(request, context, arrived), context)

    async def Tokenize(self, request: gen.TokenizeRequest | Unreadable, context: Any) -> gen.TokenizeResponse:
        """The ids that Generate would use."""

        async def work() -> gen.TokenizeResponse:
            message = _readable(request)
            given = check_input(message)
            if self._tokenising >= TOKENISE_LIMIT:
                raise ResourceExhausted(f"{TOKENISE_LIMIT} texts are being tokenised", 0.1, "tokenise")
            self._tokenising += 1
            try:
                model = self._registry.find_model(message.model)
                ids, text = await self._tokenise(model, given, _time_left(context, 60.0))
            finally:
                self._tokenising -= 1
            return gen.TokenizeResponse(ids=ids, text=text)

        return await _answer(work(), context)

    async def ListModels(self, request: gen.ListModelsRequest | Unreadable, context: Any) -> gen.ListModelsResponse:
        """Every model that some worker serves, usable yet or not."""
        models = [
            gen.ModelInfo(
                name=model.card.name,
                context_tokens=model.card.context_tokens,
                vocabulary_size=model.card.vocabulary_size,
                fingerprint=model.card.fingerprint,
                prefill_workers=len(model.usable("prefill")),
                decode_workers=len(model.usable("decode")),
            )
            for _, model in sorted(self._registry.models.items())
        ]
        return gen.ListModelsResponse(models=models)

    async def _generate(self, message: gen.GenerateRequest | Unreadable, context: Any, arrived: float) -> None:
        checked = check_request(_readable(message))
        with self._requests.slot(checked.tenant_salt, checked.request_id) as label:
            left = _time_left(context, self._config.request_limit_s)
            model = self._registry.find_model(checked.model)
            ids, _ = await self._tokenise(model, checked.input, left)
            spec = self._spec(checked, label, model, ids)
            assert model.language is not None, "it has just tokenised the prompt"
            admitted = Admitted(
                spec=spec,
                model=model,
                text=model.language.output_text(checked.stop, spec.stop_token_ids | spec.eos_token_ids),
                demand=Demand(model.card.kv_layout.blocks_for(spec.kv_tokens), len(ids)),
                digests=digests_of(model.card, ids, spec.tenant_salt),
                arrived=arrived,
                deadline=arrived + left,
                handoff_wait_s=self._config.handoff_wait_s,
                refuses=checked.refuses,
            )
            _check_room(admitted.demand, model)
            stream = ClientStream(self._config.client_buffer_tokens)
            with self._requests.running(admitted, stream) as request:
                await _deliver(request, model.card.name, stream, context)

    async def _tokenise(self, model: ServedModel, given: Input, left_s: float) -> tuple[tuple[int, ...], str]:
        """Bounded by the request's own deadline."""
        if model.language is None:
            raise Unavailable(f"{model.card.name} is being set up", NO_WORKER_RETRY_S, "workers")
        try:
            async with asyncio.timeout(left_s):
                ids, text = await tokenise(model.language, given, self._executor)
        except TimeoutError:
            raise DeadlineExceeded("the deadline passed while the prompt was tokenised") from None
        check_ids("token_ids.ids", ids, model.card.vocabulary_size)
        return ids, text

    def _spec(self, checked: Checked, label: str, model: ServedModel, ids: tuple[int, ...]) -> RequestSpec:
        card = model.card
        check_ids("stopping.stop_token_ids", checked.stop_token_ids, card.vocabulary_size)
        largest = _largest_pool(model)
        capacity = card.context_tokens if largest is None else largest * card.kv_layout.block_tokens + 1
        return RequestSpec(
            request_id=label,
            prompt=ids,
            sampling=checked.sampling,
            max_tokens=check_length(
                checked.input.field, len(ids), checked.max_tokens, card.name, card.context_tokens, capacity
            ),
            router=self._router,
            stop_token_ids=frozenset(checked.stop_token_ids),
            eos_token_ids=frozenset(() if checked.ignore_eos else card.eos_token_ids),
            objectives=self._defaults.fill(checked.objectives, card.name, checked.priority),
            priority=checked.priority,
            tenant_salt=checked.tenant_salt,
        )


def add_generation(servicer: Any, server: Any) -> None:
    """Adds the service to a grpc.aio server, with deserialisers that let the handlers answer what can't be read."""
    handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
        "Generate": grpc.unary_stream_rpc_method_handler(
            servicer.Generate,
            request_deserializer=parser(gen.GenerateRequest),
            response_serializer=None,  # the events are bytes already
        ),
        "Tokenize": grpc.unary_unary_rpc_method_handler(
            servicer.Tokenize,
            request_deserializer=parser(gen.TokenizeRequest),
            response_serializer=gen.TokenizeResponse.SerializeToString,
        ),
        "ListModels": grpc.unary_unary_rpc_method_handler(
            servicer.ListModels,
            request_deserializer=parser(gen.ListModelsRequest),
            response_serializer=gen.ListModelsResponse.SerializeToString,
        ),
    }
    name = gen.DESCRIPTOR.services_by_name["Generation"].full_name
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, handlers),))


async def _deliver(request: Request, model: str, stream: ClientStream, context: Any) -> None:
    """Writes the stream to the client until it ends; raises the error that ended it."""
    task = asyncio.current_task()
    assert task is not None
    cut = False

    def interrupt() -> None:
        nonlocal cut
        cut = True
        task.cancel()

    def send(piece: Piece) -> Coroutine[Any, None, None]:
        write: Coroutine[Any, None, None] = context.write(tokens(piece))
        return write

    stream.interrupt = interrupt
    try:
        # A client that reads nothing must not keep its place, nor what is buffered for it, for ever.
        async with asyncio.timeout_at(request.admitted.deadline + ABORT_S):
            await context.write(accepted(request.admitted.spec, model, request.attempt.plan))
            outcome = await stream.deliver(send)
            await context.write(finished(outcome))
    except TimeoutError:
        raise DeadlineExceeded("the client did not read its answer before the deadline") from None
    except asyncio.CancelledError:
        if not cut or task.uncancel() > 0:
            raise
        assert stream.error is not None, "that is what cut it off"
        raise stream.error from None
    finally:
        stream.interrupt = None


async def _answer(work: Awaitable[T], context: Any) -> T:
    """The handlers' boundary: whatever is raised becomes a status; a client that does not read gets it in time."""
    try:
        return await work
    except asyncio.CancelledError:
        raise
    except Exception as error:
        if not isinstance(error, BatonError) and context.done():
            raise asyncio.CancelledError("the client went away while it was written to") from error
        async with asyncio.timeout(ABORT_S):
            await abort(context, error)


def _readable(message: M | Unreadable) -> M:
    if isinstance(message, Unreadable):
        raise message.error
    return message


def _time_left(context: Any, otherwise_s: float) -> float:
    """Until the call's deadline; `otherwise_s` where the client set none."""
    remaining = context.time_remaining()
    return otherwise_s if remaining is None else float(remaining)


def _largest_pool(model: ServedModel) -> int | None:
    return max((worker.registration.blocks for worker in model.usable("decode")), default=None)


def _check_room(demand: Demand, model: ServedModel) -> None:
    """Raises ResourceExhausted for a sequence that no decode worker could hold, however empty."""
    largest = _largest_pool(model)
    if largest is not None and demand.blocks > largest:
        raise ResourceExhausted(
            f"prompt and stopping.max_tokens need {demand.blocks} KV blocks; the largest decode worker has {largest}",
            constraint="decode_blocks",
        )
