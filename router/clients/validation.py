"""Turns a GenerateRequest into plain data, or names the field that is wrong.

`check_request` checks the message alone; `check_ids` and `check_length`, which need the model, the tokenised prompt.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from baton.errors import InvalidArgument, Unimplemented
from baton.objectives import LEAST_MS, MOST_MS
from baton.spec import Objectives, Sampling
from baton.v1 import generation_pb2 as gen
from router.text.tokenisation import Input, Message

LABEL_BYTES, MODEL_BYTES = 128, 256
STOP_STRINGS, STOP_BYTES, STOP_TOKEN_IDS = 16, 256, 64
LOGPROBS, PRIORITY = 20, 100
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True)
class Checked:
    """A request that is valid as far as the message alone shows. `max_tokens` None: as many as fit."""

    request_id: str
    tenant_salt: str
    model: str
    input: Input
    sampling: Sampling
    max_tokens: int | None
    stop: tuple[str, ...]
    stop_token_ids: tuple[int, ...]
    ignore_eos: bool
    objectives: Objectives
    priority: int
    refuses: bool


def check_request(message: gen.GenerateRequest, given: Input | None = None) -> Checked:
    """Mints a missing seed. `given` is the input of a message that comes without, because it has been checked. Raises
    InvalidArgument, or Unimplemented for a known option that does not work yet."""
    check_labels(message.request_id, message.tenant_salt)
    _check_policies(message)
    stopping = message.stopping
    if stopping.HasField("max_tokens") and stopping.max_tokens == 0:
        raise InvalidArgument("stopping.max_tokens", "must be at least 1")
    _at_most("stopping.stop_token_ids", STOP_TOKEN_IDS, len(stopping.stop_token_ids))
    return Checked(
        request_id=message.request_id,
        tenant_salt=message.tenant_salt,
        model=check_model(message.model),
        input=check_input(message) if given is None else given,
        sampling=_check_sampling(message),
        max_tokens=stopping.max_tokens if stopping.HasField("max_tokens") else None,
        stop=_check_stop(stopping.stop),
        stop_token_ids=tuple(stopping.stop_token_ids),
        ignore_eos=stopping.ignore_eos,
        objectives=_check_objectives(message.slo),
        priority=_in_range("priority", message.priority, -PRIORITY, PRIORITY),
        refuses=message.when_unmet == gen.UNMET_POLICY_REFUSE,
    )


def check_labels(request_id: str, tenant_salt: str) -> None:
    """Raises InvalidArgument for one that is too long."""
    for name, label in (("request_id", request_id), ("tenant_salt", tenant_salt)):
        _at_most(name, LABEL_BYTES, len(label.encode()), " bytes")


def check_model(name: str) -> str:
    """The name, which may be empty. Raises InvalidArgument for one that is too long."""
    _at_most("model", MODEL_BYTES, len(name.encode()), " bytes")
    return name


def check_messages(count: int, context: int) -> None:
    """Raises InvalidArgument for more chat messages than a context has tokens: each has at least one."""
    _at_most("chat.messages", context, count, ", as the context has tokens")


def check_input(message: gen.GenerateRequest | gen.TokenizeRequest) -> Input:
    """The only input that is set. Raises InvalidArgument unless there is exactly one, and not empty."""
    names = [name for name in ("prompt", "token_ids", "chat") if name in message.DESCRIPTOR.fields_by_name]
    present = [name for name in names if message.HasField(name)]  # type: ignore[arg-type]
    if not present:
        raise InvalidArgument(names[0], f"one of {', '.join(names)} must be set")
    if len(present) > 1:
        raise InvalidArgument(present[1], f"conflicts with {present[0]}: exactly one of {', '.join(names)} may be set")
    if present[0] == "chat":
        return Input("chat", messages=_check_chat(message.chat))
    if present[0] == "prompt":
        if not message.prompt:
            raise InvalidArgument("prompt", "must not be empty")
        return Input("prompt", prompt=message.prompt)
    assert isinstance(message, gen.GenerateRequest)
    if not message.token_ids.ids:
        raise InvalidArgument("token_ids.ids", "must not be empty")
    return Input("token_ids", token_ids=tuple(message.token_ids.ids))


def check_ids(field: str, ids: Sequence[int], vocabulary: int) -> None:
    """Raises InvalidArgument for an id that the model's vocabulary lacks."""
    if ids and max(ids) >= vocabulary:
        index = next(index for index, token in enumerate(ids) if token >= vocabulary)
        raise InvalidArgument(f"{field}[{index}]", f"{ids[index]} is not a token; the vocabulary has {vocabulary}")


def check_length(checked: Checked, prompt_tokens: int, model: str, context: int, capacity: int) -> int:
    """The effective limit on output tokens. Raises InvalidArgument where prompt or output exceed the `context`.

    `capacity` is the longest sequence that some decode worker could ever hold. It shortens only a limit that the client
    left open.
    """
    where = "token_ids.ids" if checked.input.field == "token_ids" else checked.input.field
    if prompt_tokens < 1:
        raise InvalidArgument(where, "has no tokens")
    if prompt_tokens >= context:
        found = f"has {prompt_tokens} tokens; the context of {model} is {context}, one of them for the output"
        raise InvalidArgument(where, found)
    if checked.max_tokens is None:
        return max(1, min(context, capacity) - prompt_tokens)
    if prompt_tokens + checked.max_tokens > context:
        found = f"{checked.max_tokens} output tokens after {prompt_tokens} prompt tokens exceed the context of {model}"
        raise InvalidArgument("stopping.max_tokens", f"{found}, {context}; at most {context - prompt_tokens} fit")
    return checked.max_tokens


def _check_chat(chat: gen.Chat) -> tuple[Message, ...]:
    if not chat.messages:
        raise InvalidArgument("chat.messages", "must not be empty")
    for index, message in enumerate(chat.messages):
        if message.role not in ROLES:
            found = f"must be one of {', '.join(ROLES)}, not {message.role[:64]!r}"
            raise InvalidArgument(f"chat.messages[{index}].role", found)
    return tuple(Message(message.role, message.content) for message in chat.messages)


def _check_sampling(message: gen.GenerateRequest) -> Sampling:
    given: dict[str, Any] = asdict(Sampling(seed=secrets.randbits(64))) | _present(message.sampling)

    def number(name: str, low: float, high: float = math.inf, *, above: bool = False) -> float:
        value = float(given[name])
        if not math.isfinite(value) or value > high or (value <= low if above else value < low):
            least, most = "above" if above else "at least", f" and at most {high:g}" if high < math.inf else ""
            raise InvalidArgument(f"sampling.{name}", f"must be {least} {low:g}{most}, not {value:g}")
        return value

    return Sampling(
        temperature=number("temperature", 0),
        top_k=given["top_k"],
        top_p=number("top_p", 0, 1, above=True),
        min_p=number("min_p", 0, 1),
        seed=given["seed"],
        repetition_penalty=number("repetition_penalty", 0, above=True),
        presence_penalty=number("presence_penalty", -2, 2),
        frequency_penalty=number("frequency_penalty", -2, 2),
        logprobs=_in_range("logprobs", message.logprobs, 0, LOGPROBS) if message.HasField("logprobs") else None,
    )


def _check_stop(stop: Sequence[str]) -> tuple[str, ...]:
    _at_most("stopping.stop", STOP_STRINGS, len(stop), " strings")
    for index, size in enumerate(len(text.encode()) for text in stop):
        if not 1 <= size <= STOP_BYTES:
            raise InvalidArgument(f"stopping.stop[{index}]", f"must have 1 to {STOP_BYTES} bytes, not {size}")
    return tuple(dict.fromkeys(stop))


def _check_objectives(slo: gen.Slo) -> Objectives:
    given = _present(slo)
    for name, value in given.items():
        if not LEAST_MS <= value <= MOST_MS:  # refuses NaN too
            limits = f"must be from {LEAST_MS:g} to {MOST_MS:g} milliseconds"
            raise InvalidArgument(f"slo.{name}", f"{limits}, not {value:g}")
    return Objectives(**given)


def _present(message: gen.Sampling | gen.Slo) -> dict[str, Any]:
    """The fields that the client has set; all of these messages' fields have presence."""
    return {field.name: value for field, value in message.ListFields()}


def _check_policies(message: gen.GenerateRequest) -> None:
    if message.when_unmet not in gen.UnmetPolicy.values():
        raise InvalidArgument("when_unmet", f"{message.when_unmet} is not a known policy")
    if message.on_disconnect not in gen.OnDisconnect.values():
        raise InvalidArgument("on_disconnect", f"{message.on_disconnect} is not a known choice")
    if message.on_disconnect == gen.ON_DISCONNECT_LINGER:
        raise Unimplemented("on_disconnect", "lingering is not implemented; use CANCEL")


def _at_most(field: str, limit: int, given: int, unit: str = "") -> None:
    if given > limit:
        raise InvalidArgument(field, f"at most {limit}{unit}, not {given}")


def _in_range(field: str, value: int, low: int, high: int) -> int:
    if not low <= value <= high:
        raise InvalidArgument(field, f"must be from {low} to {high}, not {value}")
    return value
