"""What a client may ask for: turns a GenerateRequest into plain data, or names the field that is wrong.

Checked in two steps, because the second needs the model: `check_request` looks at the message alone,
`check_length` at the tokenised prompt and the model's context.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from baton.errors import InvalidArgument, Unimplemented
from baton.objectives import LEAST_MS, MOST_MS
from baton.spec import Objectives, Sampling
from baton.v1 import generation_pb2 as gen
from router.text.input import Input, InputField, Message

LABEL_BYTES = 128
STOP_STRINGS, STOP_BYTES, STOP_TOKEN_IDS = 16, 256, 64
LOGPROBS, PRIORITY = 20, 100
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True)
class Checked:
    """A request that is valid as far as it can be known without the model. `max_tokens` None: as many as fit."""

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


def check_request(message: gen.GenerateRequest) -> Checked:
    """Raises InvalidArgument, or Unimplemented for a known option that does not work yet. Mints a missing seed."""
    check_label("request_id", message.request_id)
    check_label("tenant_salt", message.tenant_salt)
    _check_policies(message)
    stopping = message.stopping
    if stopping.HasField("max_tokens") and stopping.max_tokens == 0:
        raise InvalidArgument("stopping.max_tokens", "must be at least 1")
    if len(stopping.stop_token_ids) > STOP_TOKEN_IDS:
        raise InvalidArgument(
            "stopping.stop_token_ids", f"at most {STOP_TOKEN_IDS}, not {len(stopping.stop_token_ids)}"
        )
    return Checked(
        request_id=message.request_id,
        tenant_salt=message.tenant_salt,
        model=message.model,
        input=check_input(message),
        sampling=_check_sampling(message),
        max_tokens=stopping.max_tokens if stopping.HasField("max_tokens") else None,
        stop=_check_stop(stopping.stop),
        stop_token_ids=tuple(stopping.stop_token_ids),
        ignore_eos=stopping.ignore_eos,
        objectives=_check_objectives(message.slo),
        priority=_in_range("priority", message.priority, -PRIORITY, PRIORITY),
        refuses=message.when_unmet == gen.UNMET_POLICY_REFUSE,
    )


def check_input(message: gen.GenerateRequest | gen.TokenizeRequest) -> Input:
    """Exactly one of the inputs that the message has, and that one not empty."""
    fields = {"prompt": message.HasField("prompt"), "chat": message.HasField("chat")}
    if isinstance(message, gen.GenerateRequest):
        fields["token_ids"] = message.HasField("token_ids")
    names = sorted(fields, key=("prompt", "token_ids", "chat").index)
    present = [name for name in names if fields[name]]
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
    """Every id is one of the model's."""
    if ids and max(ids) >= vocabulary:
        index = next(index for index, token in enumerate(ids) if token >= vocabulary)
        raise InvalidArgument(f"{field}[{index}]", f"{ids[index]} is not a token; the vocabulary has {vocabulary}")


def check_length(
    field: InputField, prompt_tokens: int, max_tokens: int | None, model: str, context: int, capacity: int
) -> int:
    """The effective limit on output tokens.

    `context` is the model's; `capacity` the longest sequence that some decode worker could ever hold. It shortens
    only a limit that the client left open; a limit that it set is kept or refused.
    """
    where = "token_ids.ids" if field == "token_ids" else field
    if prompt_tokens < 1:
        raise InvalidArgument(where, "has no tokens")
    if prompt_tokens >= context:
        raise InvalidArgument(
            where, f"has {prompt_tokens} tokens; the context of {model} is {context}, one of them for the output"
        )
    if max_tokens is None:
        return max(1, min(context, capacity) - prompt_tokens)
    if prompt_tokens + max_tokens > context:
        raise InvalidArgument(
            "stopping.max_tokens",
            f"{max_tokens} output tokens after {prompt_tokens} prompt tokens exceed the context of {model}, {context};"
            f" at most {context - prompt_tokens} fit",
        )
    return max_tokens


def check_label(field: str, text: str) -> None:
    """A short string of the client's own choice."""
    if len(text.encode()) > LABEL_BYTES:
        raise InvalidArgument(field, f"at most {LABEL_BYTES} bytes, not {len(text.encode())}")


def _check_chat(chat: gen.Chat) -> tuple[Message, ...]:
    if not chat.messages:
        raise InvalidArgument("chat.messages", "must not be empty")
    for index, message in enumerate(chat.messages):
        if message.role not in ROLES:
            raise InvalidArgument(
                f"chat.messages[{index}].role", f"must be one of {', '.join(ROLES)}, not {message.role[:64]!r}"
            )
    return tuple(Message(message.role, message.content) for message in chat.messages)


def _check_sampling(message: gen.GenerateRequest) -> Sampling:
    given, default = message.sampling, Sampling()

    def number(name: str, low: float, high: float = math.inf, *, above: bool = False) -> float:
        if not given.HasField(name):  # type: ignore[arg-type]
            return float(getattr(default, name))
        value = float(getattr(given, name))
        if not math.isfinite(value) or value > high or (value <= low if above else value < low):
            bounds = f"{'above' if above else 'at least'} {low:g}"
            raise InvalidArgument(
                f"sampling.{name}",
                f"must be {bounds}" + (f" and at most {high:g}" if high < math.inf else "") + f", not {value:g}",
            )
        return value

    return Sampling(
        temperature=number("temperature", 0),
        top_k=given.top_k if given.HasField("top_k") else default.top_k,
        top_p=number("top_p", 0, 1, above=True),
        min_p=number("min_p", 0, 1),
        seed=given.seed if given.HasField("seed") else secrets.randbits(64),
        repetition_penalty=number("repetition_penalty", 0, above=True),
        presence_penalty=number("presence_penalty", -2, 2),
        frequency_penalty=number("frequency_penalty", -2, 2),
        logprobs=_in_range("logprobs", message.logprobs, 0, LOGPROBS) if message.HasField("logprobs") else None,
    )


def _check_stop(stop: Sequence[str]) -> tuple[str, ...]:
    if len(stop) > STOP_STRINGS:
        raise InvalidArgument("stopping.stop", f"at most {STOP_STRINGS} strings, not {len(stop)}")
    for index, text in enumerate(stop):
        if not 1 <= len(text.encode()) <= STOP_BYTES:
            raise InvalidArgument(
                f"stopping.stop[{index}]", f"must have 1 to {STOP_BYTES} bytes, not {len(text.encode())}"
            )
    return tuple(dict.fromkeys(stop))


def _check_objectives(slo: gen.Slo) -> Objectives:
    for name, present, value in (
        ("ttft_ms", slo.HasField("ttft_ms"), slo.ttft_ms),
        ("tpot_ms", slo.HasField("tpot_ms"), slo.tpot_ms),
    ):
        if present and not LEAST_MS <= value <= MOST_MS:  # also what is not a number
            raise InvalidArgument(
                f"slo.{name}", f"must be from {LEAST_MS:g} to {MOST_MS:g} milliseconds, not {value:g}"
            )
    return Objectives(
        slo.ttft_ms if slo.HasField("ttft_ms") else None, slo.tpot_ms if slo.HasField("tpot_ms") else None
    )


def _check_policies(message: gen.GenerateRequest) -> None:
    if message.when_unmet not in gen.UnmetPolicy.values():
        raise InvalidArgument("when_unmet", f"{message.when_unmet} is not a known policy")
    if message.on_disconnect not in gen.OnDisconnect.values():
        raise InvalidArgument("on_disconnect", f"{message.on_disconnect} is not a known choice")
    if message.on_disconnect == gen.ON_DISCONNECT_LINGER:
        raise Unimplemented("on_disconnect", "lingering is not implemented; use CANCEL")


def _in_range(field: str, value: int, low: int, high: int) -> int:
    if not low <= value <= high:
        raise InvalidArgument(field, f"must be from {low} to {high}, not {value}")
    return value
