"""Requests and their events: plain frozen dataclasses, mirrors of the messages in `proto/baton/v1/generation.proto`.

A field that the server left out is None, never a zero made up here. Durations are in milliseconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal, TypedDict

from baton.spec import TokenLogprobs

Message = tuple[str, str]
"""A chat message: role ("system", "user" or "assistant") and content."""
WhenUnmet = Literal["best_effort", "refuse"]
OnDisconnect = Literal["cancel", "linger"]


class RequestOptions(TypedDict, total=False):
    """Keyword arguments of `Client.generate` and `Client.complete`. What is left out takes the server's default."""

    messages: list[Message]
    """A chat, rendered with the model's template; instead of a prompt."""
    token_ids: list[int]
    """Token ids, used as they are; instead of a prompt."""
    model: str
    """The name of a served model; may be left out when there is only one."""
    request_id: str
    """The caller's label for this request; minted by the router when left out."""
    temperature: float
    """0 is greedy; the default is 1."""
    top_k: int
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float
    """Keep the smallest set of tokens whose probability reaches this, in (0, 1]."""
    min_p: float
    """Keep tokens at least this likely relative to the most likely one, in [0, 1]."""
    seed: int
    """Makes the draw repeatable; minted by the router when left out, and reported in `Accepted`."""
    repetition_penalty: float
    """Divides positive and multiplies negative logits of tokens seen in prompt or output; above 0."""
    presence_penalty: float
    """Subtracted from the logits of tokens already in the output; -2 to 2."""
    frequency_penalty: float
    """Subtracted once per occurrence in the output; -2 to 2."""
    max_tokens: int
    """At most this many output tokens; by default as many as the context has room for."""
    stop: list[str]
    """Generation ends before any of these texts."""
    stop_token_ids: list[int]
    """Generation ends after any of these tokens."""
    ignore_eos: bool
    """Goes on past the model's end-of-sequence tokens."""
    logprobs: int
    """How many alternatives to report with each token, 0 to 20; left out: no log-probabilities."""
    ttft_ms: float
    """Objective: time to first token."""
    tpot_ms: float
    """Objective: mean time per output token after the first."""
    priority: int
    """Larger goes first among waiting prompts; -100 to 100."""
    when_unmet: WhenUnmet
    """What to do when the objectives can't be met."""
    on_disconnect: OnDisconnect
    """What to do when the client goes away."""
    tenant_salt: str
    """Requests share cached prefixes only with requests of the same salt."""


class FinishReason(StrEnum):
    """Why a completion ended. UNKNOWN is one that a newer server knows and this client does not."""

    EOS = "eos"
    STOP_TOKEN = "stop_token"
    STOP_STRING = "stop_string"
    LENGTH = "length"
    UNKNOWN = "unknown"


class Path(StrEnum):
    """Which way a request went through the cluster."""

    DISAGGREGATED = "disaggregated"
    PREFILL_ONLY = "prefill_only"
    DIRECT = "direct"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Accepted:
    """The request is valid and queued. First event of every stream."""

    request_id: str
    model: str
    seed: int
    prompt_tokens: int
    max_tokens: int
    predicted_ttft_ms: float | None = None
    predicted_tpot_ms: float | None = None


@dataclass(frozen=True, slots=True)
class Tokens:
    """New output. `position` is that of `ids[0]` in the sequence; `text` may lag behind the ids."""

    position: int
    ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    output_tokens: int
    cached_prompt_tokens: int


@dataclass(frozen=True, slots=True)
class FormerAttempt:
    """An attempt that did not come to the end: left `ended_ms` after arrival, with `tokens` of the output."""

    prefill_worker: str
    decode_worker: str
    handoffs: int
    tokens: int
    ended_ms: float
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """Durations of a request's phases; the message `Timeline` in generation.proto defines each."""

    ttft_ms: float
    tpot_ms: float | None
    total_ms: float
    router_ms: float
    queue_ms: float
    prefill_ms: float
    transfer_ms: float | None
    transfer_exposed_ms: float | None
    first_step_wait_ms: float | None
    decode_ms: float | None
    attempts: int
    handoffs: int
    prefill_worker: str
    decode_worker: str
    path: Path
    transport: str
    transfer_bytes: int
    transfer_blocks: int
    transfer_cached_blocks: int
    simulated: bool = False
    """No model computed this: the workers' engine is simulated."""
    former_attempts: tuple[FormerAttempt, ...] = ()
    """Those before the last one, in order."""
    preemptions: int = 0
    """How often the sequence lost its room on a decode worker."""


@dataclass(frozen=True, slots=True)
class SloOutcome:
    """Which objectives were kept; None where there was none, or where it does not apply."""

    ttft_kept: bool | None
    tpot_kept: bool | None


@dataclass(frozen=True, slots=True)
class Finished:
    """The last event of a stream. `stop` is the stop string that matched, else empty."""

    reason: FinishReason
    usage: Usage
    timeline: Timeline
    slo: SloOutcome | None = None
    stop: str = ""


Event = Accepted | Tokens | Finished


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole stream in one object. `logprobs` has one entry per token id, or none at all."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    accepted: Accepted
    finished: Finished

    @property
    def finish_reason(self) -> FinishReason:
        return self.finished.reason

    @property
    def usage(self) -> Usage:
        return self.finished.usage

    @property
    def timeline(self) -> Timeline:
        return self.finished.timeline


@dataclass(frozen=True, slots=True)
class Tokenization:
    """Token ids, and the text they were made from: the prompt, or the rendered chat."""

    ids: tuple[int, ...]
    text: str
