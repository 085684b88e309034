"""Runs prompts to their end in this process, without routers, workers or handoffs.

The baseline for benchmarks and tests of the served system: the same engine and step, first come first served, chunked
prefill, continuous batching.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from baton.engine.api import Engine, Sampled, Sequence, Work
from baton.errors import Internal, InvalidArgument, ResourceExhausted
from baton.spec import Sampling, TokenLogprobs
from kvtransfer.blocks.pool import BlockPool

GREEDY = Sampling(temperature=0.0)


@dataclass(frozen=True, slots=True)
class OfflinePrompt:
    """Continues until `max_tokens` or one of `stop_token_ids`, EOS among them, which stays in the output."""

    tokens: tuple[int, ...]
    sampling: Sampling = GREEDY
    max_tokens: int = 16
    stop_token_ids: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        if not self.tokens:
            raise InvalidArgument("tokens", "a prompt has at least one token")
        if self.max_tokens < 1:
            raise InvalidArgument("max_tokens", f"must be at least 1, not {self.max_tokens}")

    @property
    def kv_tokens(self) -> int:
        """Positions whose KV is needed: the last token drawn is never fed back."""
        return len(self.tokens) + self.max_tokens - 1


@dataclass(slots=True)
class GenerationResult:
    """One prompt's output. `prefill_s` sums the steps that computed its prompt, `step_s` has each later step, one per
    token; a step's seconds are the whole batch's."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    stopped: bool = False
    prefill_s: float = 0.0
    step_s: list[float] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class _Running:
    prompt: OfflinePrompt
    sequence: Sequence
    result: GenerationResult

    @property
    def in_prefill(self) -> bool:
        return not self.result.tokens

    @property
    def is_done(self) -> bool:
        return self.result.stopped or len(self.result.tokens) == self.prompt.max_tokens

    def take(self, sampled: Sampled | None, seconds: float) -> None:
        """Accounts for a step and appends its tokens. Raises Internal where none could be drawn."""
        if self.in_prefill:
            self.result.prefill_s += seconds
        else:
            self.result.step_s.append(seconds)
        if sampled is None:
            return
        if sampled.error:
            raise Internal(sampled.error)
        for token in sampled.token_ids:
            self.sequence.tokens.append(token)
            self.result.tokens.append(token)
            self.result.stopped = token in self.prompt.stop_token_ids
            if self.is_done:
                break
        self.result.logprobs.extend(sampled.logprobs[: len(sampled.token_ids)])


def generate(
    engine: Engine, prompts: Seq[OfflinePrompt], *, blocks: int, chunk_tokens: int = 512, max_sequences: int = 16
) -> list[GenerationResult]:
    """Runs all prompts, in batches of at most `max_sequences`, over pool blocks [0, blocks).

    A step computes one token of every decoding sequence and at most `chunk_tokens` prompt tokens. Raises
    ResourceExhausted when a prompt with its output exceeds the whole pool, and Internal where a token can't be drawn.
    """
    pool = BlockPool(blocks)
    waiting = deque((prompt, GenerationResult()) for prompt in prompts)
    results = [result for _, result in waiting]
    running: list[_Running] = []
    while waiting or running:
        while waiting and len(running) < max_sequences and (admitted := _admit(engine, *waiting[0], pool)):
            waiting.popleft()
            running.append(admitted)
        chosen = _choose(running, chunk_tokens)
        started = time.perf_counter()
        sampled = engine.step([work for _, work in chosen])
        seconds = time.perf_counter() - started
        for (entry, _), result in zip(chosen, sampled, strict=True):
            entry.take(result, seconds)
        for entry in [entry for entry in running if entry.is_done]:
            pool.release(entry.sequence.blocks)
            running.remove(entry)
    return results


def _admit(engine: Engine, prompt: OfflinePrompt, result: GenerationResult, pool: BlockPool) -> _Running | None:
    need = engine.layout.blocks_for(prompt.kv_tokens)
    if need > pool.blocks:
        raise ResourceExhausted(f"a prompt needs {need} blocks, the pool has {pool.blocks}", None, "blocks")
    held = pool.allocate(need)
    if held is None:
        return None
    sequence = Sequence(bytes(16), list(prompt.tokens), len(prompt.tokens), held, 0, prompt.sampling)
    return _Running(prompt, sequence, result)


def _choose(running: list[_Running], chunk_tokens: int) -> list[tuple[_Running, Work]]:
    """One token of each decoding sequence; prompts share a chunk, first come first served."""
    chosen, room = [], chunk_tokens
    for entry in running:
        count = 1 if not entry.in_prefill else min(entry.sequence.remaining, room)
        if count < 1:
            continue
        room -= count if entry.in_prefill else 0
        chosen.append((entry, Work(entry.sequence, count)))
    return chosen
