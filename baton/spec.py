"""A sequence as schedulers, engines and policies see it: the plain side of the wire's SequenceSpec.

Protobuf stops at the edge (`baton.rpc.convert`).
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, fields
from typing import Any

AttemptKey = bytes
"""16 random bytes, which the router mints for each attempt at a request."""


@dataclass(frozen=True, slots=True)
class ProcessRef:
    """A process; `incarnation` is minted at its start, `address` is that of its gRPC services."""

    name: str
    incarnation: str
    address: str


@dataclass(frozen=True, slots=True)
class HandoffKey:
    """One attempt's n-th handoff; the number starts at 1 and grows with each rebinding."""

    attempt: AttemptKey
    handoff: int

    def __str__(self) -> str:
        return f"{self.attempt.hex()[:12]}/{self.handoff}"


@dataclass(frozen=True, slots=True)
class Sampling:
    """`temperature` 0 is greedy; `top_k` 0 keeps all; `logprobs` None reports none."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural logarithms of the model's own distribution at one position, for the chosen token and the best ones."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Objectives:
    """The latencies that a client asks for; None where it asks for none."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestSpec:
    """`max_tokens` bounds the whole output, of all attempts together."""

    request_id: str
    prompt: tuple[int, ...]
    sampling: Sampling
    max_tokens: int
    router: ProcessRef
    stop_token_ids: frozenset[int] = frozenset()
    eos_token_ids: frozenset[int] = frozenset()
    objectives: Objectives = Objectives()
    priority: int = 0
    tenant_salt: str = ""

    def __post_init__(self) -> None:
        assert self.prompt, "a sequence has at least one prompt token"

    @property
    def total_tokens(self) -> int:
        """The longest this sequence can become."""
        return len(self.prompt) + self.max_tokens

    @property
    def kv_tokens(self) -> int:
        """Positions whose KV may be needed: the last token is never fed back."""
        return self.total_tokens - 1

    def attempted(
        self,
        attempt: AttemptKey,
        output: tuple[int, ...] = (),
        deadline_s: float | None = None,
        ttft_left_s: float | None = None,
        **others: Any,
    ) -> SequenceSpec:
        """`others` are further fields of the SequenceSpec."""
        own = {name.name: getattr(self, name.name) for name in fields(RequestSpec)} | others
        return SequenceSpec(**own, attempt=attempt, output=output, deadline_s=deadline_s, ttft_left_s=ttft_left_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceSpec(RequestSpec):
    """A sequence as one attempt carries it. `output` are the tokens of earlier attempts, apart from `prompt` because
    penalties, `max_tokens` and usage depend on it. `deadline_s` is the time left when the spec was received;
    `ttft_left_s` is the time until the first token is due, negative when it is late. `likely_tokens` is how long the
    whole output will likely become, for which workers make room; 0 asks for room for all of `max_tokens` at once.
    `age_s` is the time since the request arrived, and `preemptions` how often it lost its room since."""

    attempt: AttemptKey
    output: tuple[int, ...] = ()
    deadline_s: float | None = None
    ttft_left_s: float | None = None
    likely_tokens: int = 0
    age_s: float = 0.0
    preemptions: int = 0

    def __post_init__(self) -> None:
        RequestSpec.__post_init__(self)
        assert len(self.attempt) == 16, "an attempt key has 16 bytes"
        assert self.max_tokens > len(self.output), "nothing left to generate"

    @property
    def known_tokens(self) -> int:
        """Tokens before anything is computed."""
        return len(self.prompt) + len(self.output)


class FinishReason(enum.IntEnum):
    """Why a sequence ended; the numbers are those of the wire's FinishReason."""

    EOS = 1
    STOP_TOKEN = 2
    STOP_STRING = 3
    LENGTH = 4


class RefusalReason(enum.IntEnum):
    """Why a handoff came to nothing; the numbers are those of the wire's RefusalReason."""

    UNSPECIFIED = 0
    NO_CAPACITY = 1
    CANCELLED = 2
    UNKNOWN_ROUTER = 3
    MISMATCH = 4
    UNREACHABLE = 5
    DRAINING = 6
    TOO_LARGE = 7
    EXPIRED = 8


@dataclass(frozen=True, slots=True)
class StopRule:
    """A worker's own check after each token. The router checks stop strings, which need text."""

    stop_token_ids: frozenset[int]
    eos_token_ids: frozenset[int]
    max_tokens: int

    @classmethod
    def of(cls, spec: RequestSpec) -> StopRule:
        return cls(spec.stop_token_ids, spec.eos_token_ids, spec.max_tokens)

    def reason(self, token: int, output_tokens: int) -> FinishReason | None:
        """Why the sequence ends with `token`, its `output_tokens`-th; None if it goes on."""
        if token in self.stop_token_ids:
            return FinishReason.STOP_TOKEN
        if token in self.eos_token_ids:
            return FinishReason.EOS
        return FinishReason.LENGTH if output_tokens >= self.max_tokens else None


NEVER_STOP = StopRule(frozenset(), frozenset(), 2**62)
"""For a caller that ends the sequence itself."""
