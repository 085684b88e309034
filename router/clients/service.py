"""`baton.v1.Generation`, the service for clients."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any, TypeVar

import grpc
from google.protobuf.message import Message

from baton.config import LONGEST_S, RouterConfig
from baton.errors import BatonError, DeadlineExceeded, InvalidArgument, ResourceExhausted, Unavailable
from baton.objectives import Defaults
from baton.rpc.status import abort
from baton.spec import ProcessRef, RequestSpec
from baton.v1 import generation_pb2 as gen
from router.clients.events import accepted, finished, tokens
from router.clients.parsing import Received, Unparsed, limit_bytes, parser
from router.clients.preparation import TextModel, prepared, respond, tokenise
from router.clients.text_frames import FrameKind
from router.clients.text_queue import TextQueue
from router.clients.validation import (
    Checked,
    check_ids,
    check_input,
    check_labels,
    check_length,
    check_model,
    check_request,
)
from router.requests.admitted import Admitted, demand_of
from router.requests.request import Request
from router.requests.stream import ClientStream
from router.requests.table import Requests
from router.workers.prefixes import digests_of
from router.workers.registry import NO_WORKER_RETRY_S, Registry
from router.workers.served_model import ServedModel

ABORT_S = 2.0
"""How long a client that does not read may take to receive its error."""
TOKENIZE_S = 60.0
"""A Tokenize call without a deadline of its own."""
_IN_CARD = ("name", "context_tokens", "vocabulary_size", "fingerprint")
T = TypeVar("T")
M = TypeVar("M", bound=Message)


class GenerationService:
    """Its handlers get the error instead of a request that can't be read, and raise it. What is too long to be parsed
    in the event loop goes to `texts` as it came."""

    def __init__(
        self, config: RouterConfig, router: ProcessRef, registry: Registry, requests: Requests, texts: TextQueue
    ) -> None:
        self._config, self._router = config, router
        self._registry, self._requests, self._texts = registry, requests, texts
        self._defaults = Defaults(config.slo)

    async def Generate(self, request: Received[gen.GenerateRequest], context: Any) -> None:
        """Streams Accepted, Tokens and Finished, or ends with an error's status."""
        arrived = asyncio.get_running_loop().time()
        await _answer(self._generate(request, context, arrived), context)

    async def Tokenize(self, request: Received[gen.TokenizeRequest], context: Any) -> bytes:
        """The ids that Generate would use, as a serialised TokenizeResponse."""
        return await _answer(self._tokenised(request, context), context)

    async def ListModels(self, request: Received[gen.ListModelsRequest], context: Any) -> gen.ListModelsResponse:
        """Every model that some worker serves, usable yet or not."""
        models = [
            gen.ModelInfo(
                prefill_workers=len(model.usable("prefill")),
                decode_workers=len(model.usable("decode")),
                **{name: getattr(model.card, name) for name in _IN_CARD},
            )
            for _, model in sorted(self._registry.models.items())
        ]
        return gen.ListModelsResponse(models=models)

    async def _tokenised(self, request: Received[gen.TokenizeRequest], context: Any) -> bytes:
        given = _readable(request)
        if not isinstance(given, Unparsed):
            name, checked = check_model(given.model), check_input(given)
            return respond(checked, _text_model(self._registry.find_model(name)))
        model = _text_model(self._registry.find_model(check_model(self._labels(given)["model"])))
        return await self._process(FrameKind.TOKENIZE, model, given.data, "", _time_left(context, TOKENIZE_S))

    async def _generate(self, request: Received[gen.GenerateRequest], context: Any, arrived: float) -> None:
        given = _readable(request)
        if isinstance(given, Unparsed):
            labels = self._labels(given)
            name, request_id, tenant = check_model(labels["model"]), labels["request_id"], labels["tenant_salt"]
            check_labels(request_id, tenant)
        else:
            checked = check_request(given)
            name, request_id, tenant = checked.model, checked.request_id, checked.tenant_salt
        with self._requests.slot(tenant, request_id) as label:
            left = _time_left(context, self._config.request_limit_s)
            model = self._registry.find_model(name)
            text_model = _text_model(model)
            if isinstance(given, Unparsed):
                answer = await self._process(FrameKind.GENERATE, text_model, given.data, tenant, left)
                checked, ids = prepared(answer)
            else:
                ids, _ = tokenise(checked.input, text_model)
            admitted = self._admit(checked, label, model, ids, arrived, arrived + left)
            stream = ClientStream(self._config.client_buffer_tokens)
            with self._requests.running(admitted, stream) as running:
                await _deliver(running, model.card.name, stream, context)

    def _labels(self, given: Unparsed[Any]) -> dict[str, str]:
        """Raises InvalidArgument for more bytes than any model's longest text has."""
        return given.labels(limit_bytes([model.card.context_tokens for model in self._registry.models.values()]))

    async def _process(self, kind: FrameKind, model: TextModel, data: bytes, tenant: str, left_s: float) -> bytes:
        """Raises DeadlineExceeded after `left_s`, and as `TextQueue.run`."""
        try:
            async with asyncio.timeout(left_s):
                return await self._texts.run(kind, model, data, tenant)
        except TimeoutError:
            raise DeadlineExceeded("the deadline passed while the prompt was tokenised") from None

    def _admit(
        self, checked: Checked, label: str, model: ServedModel, ids: tuple[int, ...], arrived: float, deadline: float
    ) -> Admitted:
        """Raises InvalidArgument for a length or an id that the model can't take; ResourceExhausted for a sequence that
        no decode worker could hold, however empty."""
        card = model.card
        check_ids("stopping.stop_token_ids", checked.stop_token_ids, card.vocabulary_size)
        largest = max((worker.registration.blocks for worker in model.there("decode")), default=None)
        capacity = card.context_tokens if largest is None else largest * card.kv_layout.block_tokens + 1
        spec = RequestSpec(
            request_id=label,
            prompt=ids,
            sampling=checked.sampling,
            max_tokens=check_length(checked, len(ids), card.name, card.context_tokens, capacity),
            router=self._router,
            stop_token_ids=frozenset(checked.stop_token_ids),
            eos_token_ids=frozenset(() if checked.ignore_eos else card.eos_token_ids),
            objectives=self._defaults.fill(checked.objectives, card.name, checked.priority),
            priority=checked.priority,
            tenant_salt=checked.tenant_salt,
        )
        likely = model.lengths.likely(spec.max_tokens)
        demand = demand_of(model, len(ids), 0, likely, spec.max_tokens)
        if largest is not None and demand.at_most > largest and spec.max_tokens > 1:
            need = f"prompt and stopping.max_tokens need {demand.at_most} KV blocks"
            found = f"{need}; the largest decode worker has {largest}"
            raise ResourceExhausted(found, constraint="decode_blocks")
        assert model.language is not None, "the prompt has just been tokenised with it"
        return Admitted(
            spec=spec,
            model=model,
            text=model.language.output_text(checked.stop, spec.stop_token_ids | spec.eos_token_ids),
            demand=demand,
            likely_tokens=likely,
            digests=digests_of(card, ids, spec.tenant_salt),
            arrived=arrived,
            deadline=deadline,
            refuses=checked.refuses,
        )


def add_generation(servicer: Any, server: Any) -> None:
    """Adds the service to a grpc.aio server. The deserialisers are `parser`'s; most answers are bytes already."""
    unary, stream = grpc.unary_unary_rpc_method_handler, grpc.unary_stream_rpc_method_handler
    models = gen.ListModelsResponse.SerializeToString
    handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
        "Generate": stream(servicer.Generate, parser(gen.GenerateRequest), None),
        "Tokenize": unary(servicer.Tokenize, parser(gen.TokenizeRequest), None),
        "ListModels": unary(servicer.ListModels, parser(gen.ListModelsRequest), models),
    }
    name = gen.DESCRIPTOR.services_by_name["Generation"].full_name
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, handlers),))


async def _deliver(request: Request, model: str, stream: ClientStream, context: Any) -> None:
    """Writes the stream to the client until its end. Raises the error that ended it."""
    task = asyncio.current_task()
    assert task is not None
    cut = False

    def interrupt() -> None:
        nonlocal cut
        cut = True
        task.cancel()

    try:
        # A client that reads nothing must not keep its slot and its buffer for ever.
        async with asyncio.timeout_at(request.admitted.deadline + ABORT_S):
            await context.write(accepted(request.admitted.spec, model, request.attempt.plan))
            stream.interrupt = interrupt  # not before: gRPC can't end a call whose first message is cut off
            outcome = await stream.deliver(lambda piece: context.write(tokens(piece)))
            await context.write(finished(outcome))
    except TimeoutError:
        raise DeadlineExceeded("the client did not read its answer before the deadline") from None
    except asyncio.CancelledError:
        if not cut or task.uncancel() > 0:
            raise
        assert stream.error is not None, "only an error cuts it off"
        raise stream.error from None
    finally:
        stream.interrupt = None


async def _answer(work: Awaitable[T], context: Any) -> T:
    """The handlers' boundary: every exception becomes a status. A client that does not read it is given up."""
    try:
        return await work
    except Exception as error:
        if not isinstance(error, BatonError) and context.done():
            raise asyncio.CancelledError("the client went away while it was written to") from error
        async with asyncio.timeout(ABORT_S):
            await abort(context, error)


def _readable(message: Received[M]) -> M | Unparsed[M]:
    if isinstance(message, InvalidArgument):
        raise message
    return message


def _text_model(model: ServedModel) -> TextModel:
    if model.language is None:
        raise Unavailable(f"{model.card.name} is being set up", NO_WORKER_RETRY_S, "workers")
    return TextModel(model.language, model.card.context_tokens, model.card.vocabulary_size)


def _time_left(context: Any, otherwise_s: float) -> float:
    """Seconds until the call's deadline, at most LONGEST_S; `otherwise_s` where the client set none. Raises
    DeadlineExceeded where it has passed."""
    remaining = context.time_remaining()
    if remaining is None:
        return otherwise_s
    if not remaining > 0:
        raise DeadlineExceeded("the deadline had passed when the request came")
    return min(float(remaining), LONGEST_S)
